# SPDX-License-Identifier: Apache-2.0
"""What happened to each endpoint, and where it is in its life: the lines of `holdfast endpoint log`.

Owner: the endpoint manager; `agent.report` reads it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from agent.endpoint import Endpoint, State
from core.reconciler import Kind, Status

KEPT = 32  # lines an endpoint


@dataclass(frozen=True)
class Event:
    """One line of an endpoint's history; `time` is seconds since the epoch."""

    time: float
    ok: bool
    state: str
    message: str


class Histories:
    """The last lines of every endpoint, by endpoint id."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Event]] = {}

    def note(self, endpoint_id: int, state: State, message: str, *, ok: bool = True) -> None:
        """Add a line unless the last one says the same."""
        lines = self._lines.setdefault(endpoint_id, deque(maxlen=KEPT))
        if not lines or lines[-1].message != message:
            lines.append(Event(time.time(), ok, state.value, message))

    def of(self, endpoint_id: int) -> Sequence[Event]:
        return tuple(self._lines.get(endpoint_id, ()))

    def forget(self, endpoint_id: int) -> None:
        self._lines.pop(endpoint_id, None)


def state_of(endpoint: Endpoint, kernel: Status, *, restoring: bool) -> State:
    """Return where an endpoint is in its life, from its record and the reconcilers' status.  Pure."""
    if kernel.kind is Kind.ERROR:
        return State.NOT_READY
    if not endpoint.connected:
        gone = kernel.kind is Kind.DONE and not endpoint.identity
        return State.DISCONNECTED if gone else State.DISCONNECTING
    if restoring:
        return State.RESTORING
    if not endpoint.joined:
        return State.CREATING
    if not endpoint.identity:
        return State.WAITING_FOR_IDENTITY
    return State.REGENERATING if kernel.kind is Kind.PENDING else State.READY
