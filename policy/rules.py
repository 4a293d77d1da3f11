# SPDX-License-Identifier: Apache-2.0
"""One rule: from a document to a `Rule`.

What the parts mean is Cilium's: an endpoint that a rule with an ingress (egress) section selects is
default-deny for ingress (egress); an element without peer fields is for everybody on its ports; an
element with neither peers nor ports (``ingress: [{}]``) allows nothing, it is how default-deny is
written.  Called by `policy.language`; pure.
"""

from __future__ import annotations

from typing import Final

from core.errors import shorten
from identity.errors import LabelError
from identity.labels import Label, label, parse_label
from policy.model import Clause, Direction, Enforcement, Rule
from policy.peers import read_peers, read_selector
from policy.ports import read_transports
from policy.reader import Place

MAX_DESCRIPTION: Final = 16_384

# section → direction, deny, prefix of the peer fields
_SECTIONS: Final = {
    "ingress": (Direction.INGRESS, False, "from"),
    "ingressDeny": (Direction.INGRESS, True, "from"),
    "egress": (Direction.EGRESS, False, "to"),
    "egressDeny": (Direction.EGRESS, True, "to"),
}


def read_rule(place: Place) -> Rule:
    """Return the rule at `place`.  Raises FieldError, UnknownField, UnsupportedField."""
    given = place.fields("rule")
    if "endpointSelector" not in given:
        raise place.error("endpointSelector is missing", hint="endpointSelector: {} selects every endpoint")
    clauses: list[Clause] = []
    cidrs: set[str] = set()
    for section in _SECTIONS:
        for element in given[section].items() if section in given else []:
            clause, prefixes = _read_clause(section, element)
            cidrs |= prefixes
            clauses += [clause] if clause else []
    return Rule(
        subject=read_selector(given["endpointSelector"]),
        clauses=tuple(clauses),
        enforces=_enforcement(place, given),
        labels=_labels(given["labels"]) if "labels" in given else (),
        description=_description(given["description"]) if "description" in given else "",
        cidrs=frozenset(cidrs),
    )


def _read_clause(section: str, place: Place) -> tuple[Clause | None, frozenset[str]]:
    direction, deny, verb = _SECTIONS[section]
    element = place.fields(section)
    peers, cidrs = read_peers(element, verb)
    transports = read_transports(element)
    if peers is None and transports is None:
        if deny:
            raise place.error(
                "it names neither peers nor ports and so would deny nothing",
                hint=f"{verb}Entities: [all] denies everything",
            )
        return None, frozenset()
    return Clause(direction, deny, peers, transports), cidrs


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
