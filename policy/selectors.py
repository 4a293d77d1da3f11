# SPDX-License-Identifier: Apache-2.0
"""Selectors: which sets of labels a rule speaks of.

A selector is a set of requirements, all of which must hold; without any it selects everything (the
wildcard).  A requirement names a key, perhaps with a source (``container:app``; none or ``any`` is
every source), an operator and values:

    In            the key is there with one of the values
    NotIn         the key is not there, or with another value
    Exists        the key is there
    DoesNotExist  the key is not there

Selectors are values: canonical, hashable, cheap to compare.  `any` does not reach into the labels of
address prefixes: those belong to fromCIDR and toCIDR.  Called by the rest of this package; pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final, NamedTuple

from identity.labels import ANY, CIDR, RESERVED, Label, Labels
from identity.local import Network, cidr_label


class Operator(StrEnum):
    """What a requirement says about its key; the values are those of matchExpressions."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


# An operator that can only hold when the key is there: what an index may look up.
POSITIVE: Final = frozenset((Operator.IN, Operator.EXISTS))


class Requirement(NamedTuple):
    """One condition.  `values` is sorted, and empty for Exists and DoesNotExist."""

    source: str
    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    @property
    def positive(self) -> bool:
        return self.operator in POSITIVE

    def reads(self, label: Label) -> bool:
        """True if `label` is the one this requirement speaks of."""
        if label.key != self.key:
            return False
        return self.source == label.source or (self.source == ANY and label.source != CIDR)

    def holds(self, labels: Labels) -> bool:
        """True if the requirement is met; with several labels of the key, if one of them decides so."""
        found = [label.value for label in labels if self.reads(label)]
        if self.operator is Operator.EXISTS:
            return bool(found)
        if self.operator is Operator.DOES_NOT_EXIST:
            return not found
        listed = any(value in self.values for value in found)
        return listed if self.operator is Operator.IN else not listed

    def __str__(self) -> str:
        name = f"{self.source}:{self.key}"
        if self.operator is Operator.EXISTS:
            return name
        if self.operator is Operator.DOES_NOT_EXIST:
            return f"!{name}"
        if self.operator is Operator.IN and len(self.values) == 1:
            return f"{name}={self.values[0]}"
        return f"{name} {self.operator.lower()} ({','.join(self.values)})"


class Selector(NamedTuple):
    """Requirements that must all hold, sorted and without repetition; build one with `selector`."""

    requirements: tuple[Requirement, ...]

    @property
    def wildcard(self) -> bool:
        """True if it selects everything, known or not."""
        return not self.requirements

    def selects(self, labels: Labels) -> bool:
        return all(requirement.holds(labels) for requirement in self.requirements)

    def names(self, source: str, key: str) -> bool:
        """True if it can only select what has the label `source`:`key`."""
        return any(
            each.positive and each.key == key and each.source in (source, ANY) for each in self.requirements
        )

    def __str__(self) -> str:
        return ",".join(map(str, self.requirements)) or "all"


def selector(requirements: Iterable[Requirement]) -> Selector:
    """Return the canonical selector of `requirements`."""
    return Selector(tuple(sorted(set(requirements))))


def requirement(source: str, key: str, operator: Operator, values: Iterable[str] = ()) -> Requirement:
    """Return the canonical requirement: values sorted, each once."""
    return Requirement(source, key, operator, tuple(sorted(set(values))))


def reserved(name: str) -> Selector:
    """Return the selector of one reserved label, as ``reserved:world``."""
    return Selector((Requirement(RESERVED, name, Operator.EXISTS),))


def prefix(network: Network) -> Selector:
    """Return the selector of the identities of `network` and of every prefix inside it."""
    return Selector((Requirement(CIDR, cidr_label(network).key, Operator.EXISTS),))


WILDCARD: Final = Selector(())
WORLD: Final = reserved("world")
# Whatever is not outside: workloads, hosts, health, init, unmanaged.
CLUSTER: Final = Selector((Requirement(RESERVED, "world", Operator.DOES_NOT_EXIST),))
