# SPDX-License-Identifier: Apache-2.0
"""One rule: from a document to a `Rule`.

What the parts mean is Cilium's: an endpoint that a rule with an ingress (egress) section selects is
default-deny for ingress (egress); an element without peer fields is for everybody on its ports; an
element with neither peers nor ports (``ingress: [{}]``) allows nothing, it is how default-deny is
written.  Called by `policy.language`; pure.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from core.errors import shorten
from identity.errors import LabelError
from identity.labels import Label, label, parse_label
from policy.model import Clause, Direction, Enforcement, Requires, Rule
from policy.peers import read_peers, read_selector
from policy.ports import Ports, read_transports
from policy.prefixes import Prefixes
from policy.reader import Place
from policy.selectors import Requirement

MAX_DESCRIPTION: Final = 16_384

# section → direction, deny, prefix of the peer fields
_SECTIONS: Final = {
    "ingress": (Direction.INGRESS, False, "from"),
    "ingressDeny": (Direction.INGRESS, True, "from"),
    "egress": (Direction.EGRESS, False, "to"),
    "egressDeny": (Direction.EGRESS, True, "to"),
}


def read_rule(place: Place, prefixes: Prefixes) -> Rule:
    """Return the rule at `place`; `prefixes` counts those of the whole text.

    Raises FieldError, UnknownField, UnsupportedField.
    """
    _read_node_selector(place)
    given = place.fields("rule")
    if "endpointSelector" not in given:
        raise place.error("endpointSelector is missing", hint="endpointSelector: {} selects every endpoint")
    clauses: list[Clause] = []
    requires: list[Requires] = []
    cidrs: set[str] = set()
    for section in _SECTIONS:
        for element in given[section].items() if section in given else []:
            found = _read_element(section, element, prefixes)
            cidrs |= found.cidrs
            clauses += [found.clause] if found.clause else []
            requires += [found.requires] if found.requires else []
    return Rule(
        subject=read_selector(given["endpointSelector"]),
        clauses=tuple(clauses),
        enforces=_enforcement(place, given),
        requires=tuple(requires),
        labels=_labels(given["labels"]) if "labels" in given else (),
        description=_description(given["description"]) if "description" in given else "",
        cidrs=frozenset(cidrs),
    )


def _read_node_selector(place: Place) -> None:
    """Check a nodeSelector before the table of fields refuses it: what is wrong inside is named first."""
    selector = place.members().get("nodeSelector")
    if selector is not None and not selector.absent:
        read_selector(selector)


class _Element(NamedTuple):
    """What one element of a section says."""

    clause: Clause | None
    requires: Requires | None
    cidrs: frozenset[str]


def _read_element(section: str, place: Place, prefixes: Prefixes) -> _Element:
    direction, deny, verb = _SECTIONS[section]
    element = place.fields(section)
    peers, cidrs = read_peers(element, verb, prefixes)
    ports = read_transports(element)
    requires = _requires(section, element, alone=peers is None and ports is None)
    if peers is None and ports is None:
        if deny and requires is None:
            raise place.error(
                "it names neither peers nor ports and so would deny nothing",
                hint=f"{verb}Entities: [all] denies everything",
            )
        return _Element(None, requires, frozenset())
    transports, names = ports or Ports(None)
    endpoints = bool(peers) and f"{verb}Endpoints" in element and element[f"{verb}Endpoints"].items() != []
    return _Element(Clause(direction, deny, peers, transports, names, endpoints), requires, cidrs)


def _requires(section: str, element: dict[str, Place], *, alone: bool) -> Requires | None:
    direction, deny, verb = _SECTIONS[section]
    place = element.get(f"{verb}Requires")
    listed = place.items() if place else []
    if place is None or not listed:
        return None
    # Cilium reads this as "these peers, or everybody on these ports, whatever is required".
    if not alone and f"{verb}Endpoints" not in element:
        raise place.error(
            f"it narrows {verb}Endpoints only, and would not narrow the rest of this element",
            hint=f"beside {verb}Endpoints, or as an element of its own, as `- {verb}Requires: …`",
        )
    return Requires(direction, deny, tuple(one for each in listed for one in _requirement(each)))


def _requirement(place: Place) -> tuple[Requirement, ...]:
    required = read_selector(place)
    if required.wildcard:
        raise place.error("it requires nothing", hint="name labels, or leave it out")
    return required.requirements


def _enforcement(place: Place, given: dict[str, Place]) -> Enforcement:
    """Return which directions the rule makes default-deny; FieldError if it has no effect at all."""
    filled = {name for name in _SECTIONS if name in given and given[name].items()}
    if not filled and "enableDefaultDeny" not in given:
        raise place.error(
            f"none of {', '.join(_SECTIONS)} has an element, so the rule would do nothing",
            hint="ingress: [{}] denies all ingress, egress: [{}] all egress",
        )
    ingress = bool(filled & {"ingress", "ingressDeny"})
    egress = bool(filled & {"egress", "egressDeny"})
    if "enableDefaultDeny" in given:
        asked = given["enableDefaultDeny"].fields("enableDefaultDeny")
        ingress = asked["ingress"].flag() if "ingress" in asked else ingress
        egress = asked["egress"].flag() if "egress" in asked else egress
    return Enforcement(ingress, egress)


def _description(place: Place) -> str:
    text = place.text()
    if len(text) > MAX_DESCRIPTION:
        raise place.error(f"{len(text)} characters are more than the {MAX_DESCRIPTION} allowed")
    return text


def _labels(place: Place) -> tuple[Label, ...]:
    return tuple(_label(each) for each in place.items())


def _label(place: Place) -> Label:
    try:
        if isinstance(place.node.value, str):
            return parse_label(place.node.value)
        given = {name: each.text() for name, each in place.fields("ruleLabel").items()}
        if not given.get("key"):
            raise place.error("key is missing")
        return label(given.get("source") or "unspec", given["key"], given.get("value", ""))
    except LabelError as error:
        raise place.error(f"{shorten(error.message)}", hint=error.hint) from error
