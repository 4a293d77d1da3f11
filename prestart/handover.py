# SPDX-License-Identifier: Apache-2.0
"""What the start hook tells the agent, by environment: the instants before which it must not ask etcd.

    HOLDFAST_CONNECT_NOT_BEFORE        unix time of the first connection
    HOLDFAST_CONNECT_NOT_BEFORE_BOOT   the same on CLOCK_BOOTTIME, which no clock change moves
    HOLDFAST_RELIST_NOT_BEFORE         unix time before which a resumed watch must not turn into a full list
    HOLDFAST_WINDOW                    seconds of the window as the operator set it; auto: by cluster size
    HOLDFAST_START_KIND                fresh | resume | relist
    HOLDFAST_START_REASON              one sentence for `status`
    HOLDFAST_START_TROUBLE             what was wrong with the hook's files, for `status`; empty: nothing

The hook calls `variables`, the agent `Handover.read`.  An agent that is started without the hook (by
hand, in tests) reads an empty environment: it may connect at once, and list whenever it likes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from core.errors import shorten
from prestart.decision import Decision, Kind, Now
from prestart.errors import OptionRefused
from prestart.values import NamedTuple
from prestart.window import next_slot, slot_fraction, window_length

CONNECT = "HOLDFAST_CONNECT_NOT_BEFORE"
CONNECT_BOOT = "HOLDFAST_CONNECT_NOT_BEFORE_BOOT"
RELIST = "HOLDFAST_RELIST_NOT_BEFORE"
WINDOW = "HOLDFAST_WINDOW"
AUTO = "auto"
KIND = "HOLDFAST_START_KIND"
REASON = "HOLDFAST_START_REASON"
TROUBLE = "HOLDFAST_START_TROUBLE"


def variables(now: Now, decision: Decision, window: float | None = None, trouble: str = "") -> dict[str, str]:
    """Return the environment variables for the agent; `window` is what the operator set."""
    return {
        CONNECT: f"{decision.connect_at:.3f}",
        CONNECT_BOOT: f"{now.boot + decision.connect_at - now.wall:.3f}",
        RELIST: f"{decision.relist_at:.3f}",
        WINDOW: AUTO if window is None else f"{window:.3f}",
        KIND: decision.kind.value,
        REASON: decision.reason,
        TROUBLE: trouble,
    }


class Handover(NamedTuple):
    """The hook's message as the agent sees it; the instants are on CLOCK_BOOTTIME."""

    connect_boot: float = 0.0
    relist_boot: float = 0.0
    kind: Kind | None = None
    reason: str = ""
    window: float | None = None
    trouble: str = ""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Handover:
        """Return the message; OptionRefused for a value that is not one of the hook's.

        Without the time since boot (somebody set only HOLDFAST_CONNECT_NOT_BEFORE) today's clock is used.
        """
        if CONNECT not in environment:
            return cls()
        connect_at = _seconds(environment, CONNECT)
        if CONNECT_BOOT in environment:
            connect_boot = _seconds(environment, CONNECT_BOOT)
        else:
            connect_boot = boot_time() + connect_at - time.time()
        relist_at = _seconds(environment, RELIST) if RELIST in environment else connect_at
        return cls(
            connect_boot,
            connect_boot + relist_at - connect_at,
            _kind(environment),
            environment.get(REASON, ""),
            None if environment.get(WINDOW, AUTO) == AUTO else max(0.0, _seconds(environment, WINDOW)),
            environment.get(TROUBLE, ""),
        )

    def connect_wait(self) -> float:
        """Return the seconds until etcd may be asked; never negative."""
        return max(0.0, self.connect_boot - boot_time())

    def relist_wait(self) -> float:
        """Return the seconds until everything may be listed; never negative."""
        return max(0.0, self.relist_boot - boot_time())

    def next_relist(self, name: str, names: Sequence[str]) -> float:
        """Return the boot time of host `name`'s next slot among `names`: for a list later in its life."""
        if self.kind is None:
            return 0.0
        window = window_length(len(names)) if self.window is None else self.window
        moment = time.time()
        return boot_time() + next_slot(moment, window, slot_fraction(name, names)) - moment


def boot_time() -> float:
    """Return the seconds since boot, with the time asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _seconds(environment: Mapping[str, str], name: str) -> float:
    try:
        value = float(environment[name])
    except ValueError:
        value = float("nan")
    if not abs(value) < 2**53:
        raise OptionRefused(
            f"environment {name}={shorten(environment[name])!r} is not a time in seconds",
            hint="the start hook sets it; unset it for an agent that is started by hand",
        )
    return value


def _kind(environment: Mapping[str, str]) -> Kind | None:
    text = environment.get(KIND)
    if text is None:
        return None
    try:
        return Kind(text)
    except ValueError as error:
        kinds = ", ".join(kind.value for kind in Kind)
        raise OptionRefused(f"environment {KIND}={shorten(text)!r} is not one of {kinds}") from error
