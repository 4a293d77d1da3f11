# SPDX-License-Identifier: Apache-2.0
"""What every benchmark needs: print a figure, and the machine's load beside it.

Called by the modules of this package.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence


def emit(name: str, value: float, unit: str, n: int) -> None:
    """Print one figure as a JSON line; `n` is how many samples its median was taken of."""
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, "n": n}), flush=True)


def emit_median(name: str, samples: Sequence[float], unit: str) -> None:
    """Print the median of at least three samples, and their range as a comment line."""
    if len(samples) < 3:
        raise ValueError(f"{name}: {len(samples)} samples are fewer than 3")
    emit(name, statistics.median(samples), unit, len(samples))
    note(f"{name} from {min(samples):.4g} to {max(samples):.4g} {unit}")


def note(text: str) -> None:
    """Print a comment line."""
    print(f"# {text}", flush=True)


def load() -> None:
    """Print the machine's load as a comment line; from now on a bench that is ended puts its hosts away."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    averages = " ".join(f"{each:.2f}" for each in os.getloadavg())
    note(f"load {averages}, {os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
