# SPDX-License-Identifier: Apache-2.0
"""How evenly 5 000 hosts ask etcd after one power cut; `holdfast prestart simulate` draws it.

prestart_peak_ratio
    Starts in the busiest ten seconds by the even rate (all hosts by the length of the window), as the start
    hook of each host decides.
prestart_jitter_peak_ratio, prestart_none_peak_ratio
    The same with a random delay over the same window from each host's own boot, and with no delay.
prestart_slots_s
    CPU of deciding for all of them: what the simulation takes.
prestart_start_ms, prestart_start_mb
    The hook as a process, to the end of what it starts (nothing): time and peak memory.
floor_prestart_start_ms
    The interpreter alone.

Every host lists everything (no checkpoint names a revision) and boots within a minute of the others.  The
median is over cuts with other boots and other delays; racks and restarts one by one are printed beside it.

Run: python -m bench.prestart
"""

from __future__ import annotations

import statistics
import tempfile
import time
from random import Random

from bench.harness import emit_median, load, note
from prestart.simulation import History, Outage, Phase, Plan, Way, boots, decisions, simulate
from tests.support.starts import HOOK, INTERPRETER, cost

CUT = Plan(5_000, history=History.LOST)
SEEDS = range(1, 51)


def phases(plan: Plan) -> list[Phase]:
    """Return the one phase of each seed."""
    return [phase for seed in SEEDS for phase in simulate(plan._replace(seed=seed))]


def ratios(found: list[Phase], way: Way) -> list[float]:
    return [ratio for phase in found if (ratio := phase.ratio(way)) is not None]


def main() -> None:
    load()
    cut = phases(CUT)
    for way, name in ((Way.WINDOW, ""), (Way.JITTER, "jitter_"), (Way.NONE, "none_")):
        emit_median(f"prestart_{name}peak_ratio", ratios(cut, way), "ratio")
    for outage in (Outage.RACKS, Outage.ROLLING):
        found = phases(CUT._replace(outage=outage))
        said = (f"{way.value} {statistics.median(ratios(found, way)):.3f}" for way in Way)
        note(f"{outage.value}, over {CUT.over:.0f} s: {', '.join(said)}")
    booted = boots(CUT, Random(1))
    samples = []
    for _ in range(9):
        began = time.process_time()
        decisions(CUT, booted)
        samples.append(time.process_time() - began)
    emit_median("prestart_slots_s", samples, "s")
    with tempfile.TemporaryDirectory() as directory:
        milliseconds, megabytes = cost([*HOOK, "--state-dir", directory, "--", "/bin/true"])
    emit_median("prestart_start_ms", milliseconds, "ms")
    emit_median("prestart_start_mb", megabytes, "MB")
    emit_median("floor_prestart_start_ms", cost([*INTERPRETER, "-c", "pass"])[0], "ms")


if __name__ == "__main__":
    main()
