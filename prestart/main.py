# SPDX-License-Identifier: Apache-2.0
"""The rim of the start hook: reads clocks and files, asks `decision`, writes the state, becomes the agent.

Nothing here may keep a host from starting: a state that can not be read or written is reported and the
start goes on.  Only an option that makes no sense ends it (status 2), because somebody has just typed it.
SIGTERM and SIGINT during a wait end it at once with status 0.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from core.files import put_aside
from prestart import cluster as cluster_file
from prestart import handover, state
from prestart.decision import Cluster, Decision, Last, Now, Setting, decide
from prestart.errors import OptionRefused, StateRefused
from prestart.options import Gate, Options, parse, usage

BOOT_ID = "/proc/sys/kernel/random/boot_id"
ENDING = (signal.SIGTERM, signal.SIGINT)
# The first message of a wait comes at once, the next after 2 s, then each pause doubles up to 10 minutes.
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 600.0
ORDER_LOOK_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the hook; returns only if the agent is not started.  Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in ("--help", "-h"):
        print(usage())
        return 0
    # Blocked, not handled: the wait takes them synchronously, and process 1 has no default action.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        options = parse(given, os.environ)
    except OptionRefused as error:
        log("error", str(error))
        return 2
    now, start = read_clocks(), Start(options)
    decision = start.settle(now)
    if options.gate is Gate.START:
        who = wait_until(now.boot + decision.connect_at - now.wall, options.state_dir)
        if who is None:
            log("info", "ended during the wait; the slot is kept for the next start")
            return 0
        if who:  # the agent is not to wait either
            now = read_clocks()
            decision = start.settle(now, who)
    said = handover.variables(now, decision, options.window, "; ".join(start.troubles))
    return become(options.command, {**os.environ, **said})


def read_clocks() -> Now:
    """Return the present; a host without a boot id gets one that matches no other."""
    try:
        with open(BOOT_ID, encoding="ascii") as file:
            boot_id = file.read().strip()
    except OSError:
        boot_id = f"unknown-{time.time_ns()}"
    return Now(time.time(), handover.boot_time(), boot_id)


class Start:
    """One start: decided about, and written down.  What goes wrong is told and kept, and never fatal."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.troubles: list[str] = []

    def settle(self, now: Now, who: str = "") -> Decision:
        """Decide about this start and write it down, under the lock; `who` has ordered it to be now."""
        try:
            os.makedirs(self.options.state_dir, mode=0o700, exist_ok=True)
            with state.locked(self.options.state_dir):
                return self._settle(now, who)
        except (StateRefused, OSError) as error:
            self._report(f"starting without the state file: {error}")
            return self._settle(now, who)

    def _settle(self, now: Now, who: str) -> Decision:
        options, last = self.options, self._last(now)
        setting = Setting(options.node_name, options.nodes, options.window)
        order = who or state.ordered(options.state_dir)
        # With its time, or a second order by the same person would look like a forgotten variable.
        override = f"{order} at {now.wall:.3f}" if order else options.override
        decision = decide(now, setting, self._cluster(), last, override)
        self._tell(decision, last)
        try:
            state.save(options.state_dir, options.node_name, now, decision)
        except OSError as error:
            self._report(f"this start can not be written down: {error}")
        return decision

    def _last(self, now: Now) -> Last | None:
        try:
            return state.load(self.options.state_dir, self.options.node_name, now)
        except StateRefused as error:
            self._put_aside(state.FILE, error)
            return None

    def _cluster(self) -> Cluster | None:
        try:
            return cluster_file.load(self.options.state_dir)
        except StateRefused as error:
            self._put_aside(cluster_file.FILE, error)
            return None

    def _put_aside(self, name: str, reason: StateRefused) -> None:
        outcome = put_aside(os.path.join(self.options.state_dir, name))
        self._report(f"{reason}; {outcome}; going on as on a first start")

    def _report(self, trouble: str) -> None:
        log("warning", trouble)
        self.troubles.append(trouble)

    def _tell(self, decision: Decision, last: Last | None) -> None:
        options = self.options
        log("info", f"{options.node_name}: {decision.reason}, gate {options.gate.value}")
        if options.override and last is not None and last.override == options.override:
            who = options.override
            log("warning", f"the override by {who} was for the previous start and is not used again")


def wait_until(deadline: float, directory: str) -> str | None:
    """Wait until `deadline` (seconds since boot), a signal, or an order.

    Returns who ordered, nobody ("") at the deadline, None when a signal ends the wait.
    """
    pause, report_at = FIRST_PAUSE_S, 0.0
    while (left := deadline - (at := handover.boot_time())) > 0:
        if at >= report_at:
            log("info", f"waiting {left:.0f} s more for this host's slot (`holdfast start-now` ends it)")
            pause, report_at = min(pause * 2, LONGEST_PAUSE_S), at + pause
        if signal.sigtimedwait(ENDING, min(left, ORDER_LOOK_S)) is not None:
            return None
        if who := state.ordered(directory):
            log("warning", f"started now by order of {who}, {left:.0f} s before this host's slot")
            return who
    return ""


def become(command: Sequence[str], environment: dict[str, str]) -> int:
    """Replace this process by `command`.

    Returns 127 or 126 if that is impossible, 0 if a signal came first.
    """
    if signal.sigtimedwait(ENDING, 0) is not None:
        return 0
    # Ignored and blocked signals survive exec: the agent must not inherit ours, nor those Python ignores.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    sys.stderr.flush()
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        log("error", f"{command[0]} can not be started: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126


def log(level: str, message: str) -> None:
    """Write one line to stderr in the format of the agent's own log."""
    moment = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    sys.stderr.write(
        f"{stamp}.{int(moment % 1 * 1000):03d}Z level={level.upper()} subsys=prestart {message}\n"
    )
