# SPDX-License-Identifier: Apache-2.0
"""Which addresses a name has: `<service>.<project>` of compose, on every host of the cluster.

Nothing is written for it, nothing is asked: what names a workload are the labels of its identity, and who has
an identity is in the ip→identity table.

    identities   number → labels ──▶ name ─┐
                                           ├─▶ name → addresses ──▶ agent.names_zone
    addresses    prefix → number ──────────┘

A name is there as long as an address has it; where etcd has a part of a name's addresses no more, the others
are told.  Kept up by the tables' changes, so that a question costs the same in a fleet of any size.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from agent import names_wire as wire
from agent.ipcache import IpTable
from core.table import Table
from identity.labels import CONTAINER, Labels
from identity.numbers import is_global

PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"
# Seconds for which an answer may be remembered: a container that is gone is not asked for longer than its
# clients' next try takes, and a client that connects without a pause does not ask each time.
TTL_S = 5
# So many changes are taken before anybody else may run: some milliseconds.
CHANGES_AT_ONCE = 500

# What resolvers pass on and C libraries accept: a host's name, and the underscore that compose allows.
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_HOST_LENGTHS = ("/32", "/128")

K = TypeVar("K")
V = TypeVar("V")


class Name(NamedTuple):
    """A name in the zone, in lower case."""

    service: bytes
    project: bytes


class Records(NamedTuple):
    """The addresses of a name, each as the record that is sent."""

    v4: tuple[bytes, ...] = ()
    v6: tuple[bytes, ...] = ()


def compose_labels(labels: Labels) -> tuple[str, str] | None:
    """Return (service, project) of a container's labels; None for one that compose did not make."""
    service, project = labels.get(CONTAINER, SERVICE_LABEL), labels.get(CONTAINER, PROJECT_LABEL)
    return (service, project) if service and project else None


def name_of(service: str, project: str) -> Name | None:
    """Return the name of a service; None where one of the two can be no label of DNS."""
    if not (_LABEL.fullmatch(service) and _LABEL.fullmatch(project)):
        return None
    return Name(service.lower().encode("ascii"), project.lower().encode("ascii"))


class Names:
    """Name → addresses, brought up to date change by change.  Pure.

    Labels and addresses come in any order: of two keys in etcd nobody says which is delivered first.
    """

    def __init__(self) -> None:
        self.unusable: dict[int, str] = {}  # identity → the service and project that make no name
        self._addresses: dict[Name, dict[str, None]] = {}
        self._doubtful: set[str] = set()
        self._projects: Counter[bytes] = Counter()  # names that have an address
        self._built: dict[Name, Records] = {}
        self._name_of: dict[int, Name] = {}
        self._members: dict[int, dict[str, None]] = {}  # identity → its addresses
        self._identity_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def get(self, name: Name) -> Records | None:
        """Return the records of a name, None when nobody has it."""
        built = self._built.get(name)
        if built is None and name in self._addresses:
            addresses = self._addresses[name]
            sure = [each for each in addresses if each not in self._doubtful]
            built = self._built[name] = _records(sure or addresses)
        return built

    def has_project(self, project: bytes) -> bool:
        """Whether there is a name below this one."""
        return project in self._projects

    def identities(self) -> Iterable[int]:
        """Return the identities that name something, or would."""
        return [*self._name_of, *self.unusable]

    def prefixes(self) -> Iterable[str]:
        """Return the prefixes of all workloads."""
        return list(self._identity_of)

    def set_labels(self, identity: int, labels: Labels | None) -> None:
        """Take the labels of an identity; None when it is gone."""
        self.unusable.pop(identity, None)
        found = compose_labels(labels) if labels is not None else None
        name = name_of(*found) if found else None
        if found and name is None:
            self.unusable[identity] = ".".join(found)
        old = self._name_of.pop(identity, None)
        if name is not None:
            self._name_of[identity] = name
        if name != old:
            for prefix in self._members.get(identity, ()):
                self._move(prefix, old, name)

    def set_identity(self, prefix: str, identity: int | None, *, doubtful: bool = False) -> None:
        """Take whose a prefix is; None when it is nobody's.  Only a workload's single address has a name.

        A `doubtful` one may be gone: it is told only of a name that has no other address.
        """
        if identity is not None and not (is_global(identity) and prefix.endswith(_HOST_LENGTHS)):
            identity = None
        old = self._identity_of.pop(prefix, None)
        if identity is not None:
            self._identity_of[prefix] = identity
        self._doubt(prefix, self._name_at(old), doubtful=doubtful and identity is not None)
        if identity == old:
            return
        if old is not None:
            members = self._members[old]
            del members[prefix]
            if not members:
                del self._members[old]
        if identity is not None:
            self._members.setdefault(identity, {})[prefix] = None
        self._move(prefix, self._name_at(old), self._name_at(identity))

    def _doubt(self, prefix: str, name: Name | None, *, doubtful: bool) -> None:
        if doubtful == (prefix in self._doubtful):
            return
        self._doubtful ^= {prefix}
        if name is not None:
            self._built.pop(name, None)

    def _name_at(self, identity: int | None) -> Name | None:
        return None if identity is None else self._name_of.get(identity)

    def _move(self, prefix: str, old: Name | None, new: Name | None) -> None:
        """Give an address of one name to another; both may be none."""
        if old == new:
            return
        if old is not None:
            self._built.pop(old, None)
            addresses = self._addresses[old]
            del addresses[prefix]
            if not addresses:
                del self._addresses[old]
                self._count(old.project, -1)
        if new is not None:
            self._built.pop(new, None)
            if new not in self._addresses:
                self._addresses[new] = {}
                self._count(new.project, 1)
            self._addresses[new][prefix] = None

    def _count(self, project: bytes, names: int) -> None:
        self._projects[project] += names
        if not self._projects[project]:
            del self._projects[project]


def _records(prefixes: Iterable[str]) -> Records:
    texts = [prefix.partition("/")[0] for prefix in prefixes]
    return Records(
        tuple(_record(wire.A, socket.AF_INET, each) for each in texts if ":" not in each),
        tuple(_record(wire.AAAA, socket.AF_INET6, each) for each in texts if ":" in each),
    )


def _record(kind: int, family: socket.AddressFamily, address: str) -> bytes:
    return wire.record(wire.QUESTION_NAME, kind, TTL_S, socket.inet_pton(family, address))


class NameIndex:
    """Keeps `names` equal to the two tables.  Implements agent.names_zone.Index."""

    def __init__(self, identities: Table[int, Labels], addresses: IpTable) -> None:
        self.names = Names()
        self._identities = identities
        self._addresses = addresses
        self._read: set[str] = set()  # tables of which everything is known, once

    @property
    def complete(self) -> bool:
        """Whether all is known, so that what is not there can be denied; losing etcd takes nothing back."""
        return len(self._read) == 2

    @property
    def serial(self) -> int:
        """Return a number that grows with every change."""
        return self._identities.revision + self._addresses.revision

    def get(self, name: Name) -> Records | None:
        return self.names.get(name)

    def has_project(self, project: bytes) -> bool:
        return self.names.has_project(project)

    async def follow_identities(self) -> None:
        """Follow the labels until cancelled."""
        await self._follow(self._identities, self.names.identities(), self._take_identity)

    async def follow_addresses(self) -> None:
        """Follow the addresses until cancelled."""
        await self._follow(self._addresses, self.names.prefixes(), self._take_address)

    async def _follow(self, table: Table[K, V], known: Iterable[K], take: Callable[[K], None]) -> None:
        """Take every change; begun again it also takes what has gone meanwhile, which `known` still names."""
        changes = table.subscribe()
        changes.mark_many(known)
        try:
            while True:
                await changes.wait()
                for key in changes.take(CHANGES_AT_ONCE):
                    take(key)
                if table.in_sync and not len(changes):
                    self._read.add(table.name)
                await asyncio.sleep(0)
        finally:
            table.unsubscribe(changes)

    def _take_identity(self, number: int) -> None:
        self.names.set_labels(number, self._identities.get(number))

    def _take_address(self, prefix: str) -> None:
        record = self._addresses.get(prefix)
        identity = None if record is None else record.identity
        self.names.set_identity(prefix, identity, doubtful=self._addresses.is_doubtful(prefix))
