# SPDX-License-Identifier: Apache-2.0
"""The values this package takes and gives: policies and rules on one side, map entries on the other.

All of them are immutable and compare by value.  Called by every module here and by the agent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, Final, NamedTuple

from identity.labels import Label
from policy.selectors import Requirement, Selector

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
SCTP: Final = 132

MAX_PORT: Final = 65_535

# What a policy map holds (Cilium 1.11's cilium_policy_<id>).
MAX_ENTRIES: Final = 16_384


class Direction(IntEnum):
    """Seen from the endpoint; the value is the `egress` bit of the policy map's key."""

    INGRESS = 0
    EGRESS = 1


class EnforcementMode(Enum):
    """The option enable-policy: which endpoints are enforced."""

    DEFAULT = "default"  # a direction of an endpoint, once a rule with that section selects it
    ALWAYS = "always"  # every endpoint, both directions
    NEVER = "never"  # none: rules are read and kept, but everything is allowed


class Enforcement(NamedTuple):
    """Which directions deny what no rule allows."""

    ingress: bool
    egress: bool


class Transport(NamedTuple):
    """A destination port (host order) and IP protocol; an ICMP type stands in `port`."""

    port: int
    protocol: int


# Every port of every protocol.  No real transport equals it: protocol 0 is not used by policies.
ANY_TRANSPORT: Final = Transport(0, 0)


class NamedPort(NamedTuple):
    """A port by its name (lower case) and IP protocol; which number that is depends on whose port it is."""

    name: str
    protocol: int


class PolicyKey(NamedTuple):
    """Key of a policy map entry.  Identity 0 is any, port and protocol 0 are any; port in host order."""

    identity: int
    dport: int
    protocol: int
    direction: Direction


class PolicyEntry(NamedTuple):
    """Value of a policy map entry without its counters.

    `proxy_port` 0: not redirected.  `until` 0: for ever, as all that a policy says.
    """

    deny: bool
    proxy_port: int = 0
    until: int = 0


ALLOW: Final = PolicyEntry(deny=False)
DENY: Final = PolicyEntry(deny=True)


@dataclass(frozen=True, slots=True)
class MapChange:
    """What one endpoint's map needs to go from its last published state to the wanted one."""

    upserts: dict[PolicyKey, PolicyEntry] = field(default_factory=dict)
    deletes: set[PolicyKey] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.upserts or self.deletes)


@dataclass(frozen=True, slots=True)
class Clause:
    """One element of a rule's ingress, egress, ingressDeny or egressDeny section.

    `peers` None is everybody (no peer field was given); an empty tuple is nobody.
    `transports` None is every port of every protocol; `names` are further ports, those that the receiver
    of a packet gave these names.  `endpoints` says that the peers are of fromEndpoints or toEndpoints, which
    the requirements of all rules narrow.
    """

    direction: Direction
    deny: bool
    peers: tuple[Selector, ...] | None
    transports: tuple[Transport, ...] | None
    names: tuple[NamedPort, ...] = ()
    endpoints: bool = False


class Requires(NamedTuple):
    """What fromRequires or toRequires adds to the endpoint peers of one direction, of allows or of denies."""

    direction: Direction
    deny: bool
    requirements: tuple[Requirement, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: whom it is for, what it allows and denies, which directions it makes default-deny.

    `requires` narrows the clauses of every rule that is for the same endpoint.  `cidrs` are the prefixes
    its clauses name, which need identities to be of effect.
    """

    subject: Selector
    clauses: tuple[Clause, ...]
    enforces: Enforcement
    requires: tuple[Requires, ...] = ()
    labels: tuple[Label, ...] = ()
    description: str = ""
    cidrs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Policy:
    """A named set of rules from one document.

    `name` is unique in the repository (``namespace/name`` or ``name``); `origin` says where it came
    from, for messages; `document` is the text as JSON would load it, for `policy get`.
    """

    name: str
    origin: str
    rules: tuple[Rule, ...]
    document: Any = field(compare=False, default=None)

    @property
    def cidrs(self) -> frozenset[str]:
        return frozenset().union(*(rule.cidrs for rule in self.rules))
