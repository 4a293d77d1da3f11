# SPDX-License-Identifier: Apache-2.0
"""From documents to policies in force: which document owns which name, and what was refused.

    directory, holdfast/policies/v1/ ──▶ documents (origin → policies) ──▶ policies (name → policy)

Both sources (`agent.policy_sources`) feed the table of documents, with the mechanism that every table has:
a relist that lacks a document keeps it for a grace.  A document is taken whole or not at all.  The same name
in two documents is an error; the one that was in force first keeps its place, and the other takes it over
as soon as the name is free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from loguru import logger

from core import metrics
from core.errors import HoldfastError, shorten
from core.table import Table
from policy.errors import PolicyNameError
from policy.model import Policy

DIRECTORY = "directory"
KVSTORE = "kvstore"

PolicyTable = Table[str, Policy]
Document = tuple[Policy, ...]
DocumentTable = Table[str, Document]

# Kinds of refusal; one origin may have both.
TEXT, NAME = "text", "name"


def new_policies() -> PolicyTable:
    return Table("policies", (DIRECTORY, KVSTORE))


def new_documents() -> DocumentTable:
    return Table("policy-documents", (DIRECTORY, KVSTORE))


@dataclass(frozen=True)
class Refusal:
    """A document that is not in force: `name` is the policy's or the file's."""

    name: str
    origin: str
    error: str
    since: float


class Refusals:
    """What was refused; the first screen of a person who asks why nothing changed."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Refusal] = {}

    def add(self, name: str, origin: str, error: HoldfastError, kind: str = TEXT) -> None:
        known = self._found.get((origin, kind))
        if known is not None and known.error == str(error):
            return
        metrics.POLICY_IMPORT_ERRORS.inc()
        logger.error("policy from {} is refused, the last good one stays in force: {}", origin, error)
        self._found[origin, kind] = Refusal(name, origin, str(error), time.time())

    def clear(self, origin: str, kind: str) -> None:
        self._found.pop((origin, kind), None)

    def origins(self, kind: str) -> list[str]:
        return [origin for origin, each in self._found if each == kind]

    def all(self) -> list[Refusal]:
        return list(self._found.values())


class PolicyNames:
    """Keeps the table of policies equal to the documents; owner of both directions of name and origin."""

    def __init__(self, documents: DocumentTable, policies: PolicyTable, refusals: Refusals) -> None:
        self._documents = documents
        self._policies = policies
        self._refusals = refusals
        self._changes = documents.subscribe()
        self._holder: dict[str, str] = {}  # name → origin
        self._names: dict[str, tuple[str, ...]] = {}  # origin → names
        self._source_of: dict[str, str] = {}  # origin → source
        self._blocked: dict[str, None] = {}  # origins that wait for a name, longest first

    def holder(self, name: str) -> str | None:
        """Return the origin whose policy of this name is in force."""
        return self._holder.get(name)

    async def run(self) -> None:
        """Follow the documents until cancelled."""
        while True:
            self.settle()
            await self._changes.wait()

    def settle(self) -> None:
        """Take every change of the documents into the policies, now."""
        changed = self._changes.take()
        # What goes frees its names for what comes: a document may have moved.
        for origin in changed:
            if origin not in self._documents:
                self._drop(origin)
        for origin in changed:
            self._take(origin)
        self._retry_blocked()
        for source in self._documents.sources:
            if source.complete:
                self._policies.source(source.name).mark_complete()
            if source.in_sync:
                self._policies.source(source.name).mark_in_sync()

    def _retry_blocked(self) -> None:
        waiting = -1
        while waiting != len(self._blocked):
            waiting = len(self._blocked)
            for origin in list(self._blocked):
                self._take(origin)

    def _take(self, origin: str) -> None:
        document = self._documents.get(origin)
        if document is None:
            return
        taken = self._taken(origin, document)
        if taken:
            self._blocked.setdefault(origin)
            self._refusals.add(taken[0], origin, self._conflict(origin, taken[0]), NAME)
            return
        self._blocked.pop(origin, None)
        self._refusals.clear(origin, NAME)
        self._put(origin, document)

    def _put(self, origin: str, document: Document) -> None:
        owner = self._documents.owner(origin) or DIRECTORY
        source = self._policies.source(owner)
        self._source_of[origin] = owner
        names = tuple(policy.name for policy in document)
        self._release(origin, keep=names)
        for policy in document:
            self._holder[policy.name] = origin
            source.upsert(policy.name, policy)
        self._names[origin] = names

    def _drop(self, origin: str) -> None:
        self._release(origin)
        self._names.pop(origin, None)
        self._source_of.pop(origin, None)
        self._blocked.pop(origin, None)
        for kind in (TEXT, NAME):
            self._refusals.clear(origin, kind)

    def _release(self, origin: str, keep: Sequence[str] = ()) -> None:
        for name in self._names.get(origin, ()):
            if name not in keep:
                del self._holder[name]
                self._policies.source(self._source_of[origin]).delete(name)

    def _taken(self, origin: str, document: Document) -> list[str]:
        return [each.name for each in document if self._holder.get(each.name, origin) != origin]

    def _conflict(self, origin: str, name: str) -> PolicyNameError:
        return PolicyNameError(
            f"{origin}: policy {shorten(name)} exists already, from {self._holder[name]}",
            hint="delete one of the two or rename it",
        )
