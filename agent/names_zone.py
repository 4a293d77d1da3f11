# SPDX-License-Identifier: Apache-2.0
"""What is answered to a question for a name of the cluster's zone, `<service>.<project>.<domain>`.  Pure.

| asked for | answer |
|---|---|
| a name that has addresses of the type | they, in turns; by UDP as many as fit, marked when that is not all |
| a name that has none of the type, a project, the domain | nothing, with the zone's SOA |
| any other name of the zone | NXDOMAIN, with the zone's SOA |
| either of the last two while not all is known | SERVFAIL: a resolver asks on, and remembers no wrong no |
| anything else | REFUSED: docker's resolver, and any C library, asks its next server |

Called by: agent.names_server, with packets from strangers.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

from agent import names_wire as wire
from agent.names import TTL_S, Name, Records
from agent.names_wire import BadQuery, Code, Query

_NOTHING = Records()


class Outcome(enum.Enum):
    """What became of a packet; the value is the metric's."""

    ANSWERED = "answered"
    TRUNCATED = "truncated"  # answered as far as UDP has room; the client comes again by TCP
    NO_SUCH_TYPE = "nodata"
    NO_SUCH_NAME = "nxdomain"
    NOT_READY = "servfail"  # not all is known yet
    NOT_OURS = "refused"  # another domain, or somebody who is not served
    MALFORMED = "malformed"
    IGNORED = "ignored"  # no question at all


class Reply(NamedTuple):
    """What to send back, empty for nothing, and why."""

    packet: bytes
    outcome: Outcome


class Index(Protocol):
    """The names (agent.names.NameIndex)."""

    @property
    def complete(self) -> bool: ...

    @property
    def serial(self) -> int: ...

    def get(self, name: Name) -> Records | None: ...

    def has_project(self, project: bytes) -> bool: ...


class Zone:
    """Answers for one domain.  `choose` returns a number below the one it gets: where an answer begins."""

    def __init__(self, domain: str, index: Index, choose: Callable[[int], int] = random.randrange) -> None:
        self.domain = domain
        self._labels = tuple(each.encode("ascii") for each in domain.split("."))
        self._index = index
        self._choose = choose

    def reply(self, packet: bytes, *, stream: bool = False, served: bool = True) -> Reply:
        """Return what to say to a packet, for one who is `served` or not."""
        if not wire.is_answerable(packet):
            return Reply(b"", Outcome.IGNORED)
        try:
            query = wire.parse(packet)
        except BadQuery as error:
            return Reply(wire.refusal(packet, error.code), Outcome.MALFORMED)
        below = self._below(query) if served else None
        if below is None:
            return Reply(wire.answer(query, Code.REFUSED, authoritative=False), Outcome.NOT_OURS)
        return self._about(query, below, wire.STREAM_SIZE if stream else query.room)

    def _below(self, query: Query) -> tuple[bytes, ...] | None:
        """Return what is asked for below the domain; None when the question is not for it."""
        own = len(self._labels)
        ours = query.labels[-own:] == self._labels and query.cls in (wire.IN, wire.ANY)
        return query.labels[:-own] if ours and query.type not in (wire.AXFR, wire.IXFR) else None

    def _about(self, query: Query, below: tuple[bytes, ...], room: int) -> Reply:
        found = self._index.get(Name(*below)) if len(below) == 2 else None
        records = self._records(query, found or _NOTHING)
        if not below and query.type in (wire.SOA, wire.ANY):
            records = (self._soa(query, below),)
        if records:
            packet = wire.answer(query, Code.OK, records=records, room=room)
            return Reply(packet, Outcome.TRUNCATED if wire.is_truncated(packet) else Outcome.ANSWERED)
        if not self._index.complete:
            return Reply(wire.answer(query, Code.NOT_READY, authoritative=False), Outcome.NOT_READY)
        known = found is not None or not below or (len(below) == 1 and self._index.has_project(below[0]))
        code, outcome = (
            (Code.OK, Outcome.NO_SUCH_TYPE) if known else (Code.NO_SUCH_NAME, Outcome.NO_SUCH_NAME)
        )
        return Reply(wire.answer(query, code, authority=self._soa(query, below), room=room), outcome)

    def _records(self, query: Query, found: Records) -> tuple[bytes, ...]:
        v4 = self._in_turn(found.v4) if query.type in (wire.A, wire.ANY) else ()
        v6 = self._in_turn(found.v6) if query.type in (wire.AAAA, wire.ANY) else ()
        return v4 + v6

    def _in_turn(self, records: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return the records from one of them on, so that each client meets another one first.

        By chance and not by count: clients that ask for two types at a time would always meet the same.
        """
        if len(records) < 2:
            return records
        start = self._choose(len(records))
        return records[start:] + records[:start]

    def _soa(self, query: Query, below: tuple[bytes, ...]) -> bytes:
        return wire.soa(query.pointer(len(below)), TTL_S, self._index.serial)
