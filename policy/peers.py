# SPDX-License-Identifier: Apache-2.0
"""Selectors, prefixes and entities: from documents to the selectors of a clause.

Called by `policy.rules`; pure.
"""

from __future__ import annotations

from typing import Final

from core.errors import shorten
from identity import numbers
from identity.errors import LabelError
from identity.labels import ANY, CIDR, RESERVED, label
from identity.local import Network
from policy.prefixes import Prefixes
from policy.reader import Place
from policy.selectors import (
    CLUSTER,
    WILDCARD,
    WORLD,
    Operator,
    Requirement,
    Selector,
    prefix,
    requirement,
    reserved,
    selector,
)

ENTITIES: Final[dict[str, tuple[Selector, ...]]] = {
    "all": (WILDCARD,),
    "world": (WORLD,),
    "cluster": (CLUSTER,),
    "none": (),
    **{name: (reserved(name),) for name in ("host", "remote-node", "init", "unmanaged", "health")},
}


def read_peers(
    element: dict[str, Place], verb: str, prefixes: Prefixes
) -> tuple[tuple[Selector, ...] | None, frozenset[str]]:
    """Return the peers of one element and the prefixes they name; `verb` is ``from`` or ``to``.

    `prefixes` counts those of the whole text.  None is everybody (no peer field), () nobody.

    Raises FieldError.
    """
    given = [name for name in PEER_FIELDS if verb + name in element]
    full = [verb + name for name in given if element[verb + name].items()]
    if len(full) > 1:
        raise element[full[1]].error(f"{full[0]} and {full[1]} in one element", hint="write two elements")
    if not given:
        return None, frozenset()
    if not full:
        return (), frozenset()
    return _read(full[0].removeprefix(verb), element[full[0]], prefixes)


def _read(kind: str, place: Place, prefixes: Prefixes) -> tuple[tuple[Selector, ...], frozenset[str]]:
    if kind == "Endpoints":
        return tuple(dict.fromkeys(read_selector(each) for each in place.items())), frozenset()
    if kind == "Entities":
        found = [each for entity in place.items() for each in _entity(entity)]
        return tuple(dict.fromkeys(found)), frozenset()
    reader = prefixes.of_cidr if kind == "CIDR" else prefixes.of_set
    networks = list(dict.fromkeys(network for each in place.items() for network in reader(each)))
    selectors = [each for network in networks for each in _network_selectors(network)]
    # /0 needs no identity of its own: what no prefix in the ipcache covers is `world` already.
    return tuple(dict.fromkeys(selectors)), frozenset(str(each) for each in networks if each.prefixlen)


PEER_FIELDS: Final = ("Endpoints", "CIDR", "CIDRSet", "Entities")


def read_selector(place: Place) -> Selector:
    """Return the selector of ``{matchLabels, matchExpressions}``.  Raises FieldError."""
    given = place.fields("selector")
    found: list[Requirement] = []
    if "matchLabels" in given:
        found += [_match_label(key, each) for key, each in given["matchLabels"].members().items()]
    if "matchExpressions" in given:
        found += [_expression(each) for each in given["matchExpressions"].items()]
    return selector(found)


def _match_label(name: str, place: Place) -> Requirement:
    source, key = _key(name, place)
    return requirement(source, key, Operator.IN, [_value(source, key, place)])


def _expression(place: Place) -> Requirement:
    given = place.fields("matchExpressions")
    for field in ("key", "operator"):
        if field not in given:
            raise place.error(f"{field} is missing")
    source, key = _key(given["key"].text(), given["key"])
    operator = Operator(given["operator"].choice([each.value for each in Operator], "operator"))
    places = given["values"].items() if "values" in given else []
    if bool(places) != (operator in (Operator.IN, Operator.NOT_IN)):
        need = "needs values" if not places else "takes no values"
        raise given.get("values", place).error(f"{operator} {need}")
    return requirement(source, key, operator, [_value(source, key, each) for each in places])


def _key(name: str, place: Place) -> tuple[str, str]:
    source, colon, key = name.partition(":")
    if not colon:
        source, key = ANY, name
    source = source or ANY
    try:
        label(source, key)
    except LabelError as error:
        raise place.error(error.message, hint=error.hint) from error
    if source == CIDR:
        raise place.error("labels of address prefixes are not for selectors", hint="use a CIDR field")
    if source == RESERVED and key not in numbers.BY_NAME:
        known = ", ".join(numbers.BY_NAME)
        raise place.error(f"{shorten(name)} is no reserved label", hint=f"known: {known}")
    return source, key


def _value(source: str, key: str, place: Place) -> str:
    try:
        return label(source, key, place.text()).value
    except LabelError as error:
        raise place.error(error.message, hint=error.hint) from error


def _entity(place: Place) -> tuple[Selector, ...]:
    if place.node.value == "kube-apiserver":
        raise place.unsupported("there is no Kubernetes API server", hint="use its address in a CIDR field")
    return ENTITIES[place.choice(ENTITIES, "entity")]


def _network_selectors(network: Network) -> tuple[Selector, ...]:
    return (prefix(network), WORLD) if network.prefixlen == 0 else (prefix(network),)
