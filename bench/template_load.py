# SPDX-License-Identifier: Apache-2.0
"""Loading an endpoint's programs from the template, against compiling them for it.

template_load_ms
    Object opened from memory → all programs of an endpoint loaded: constants written, maps given, verified,
    translated.  Wall time in this process.
template_vs_compile_ratio
    (clang + the same load) / load, alternating.

Instructions that the verifier walked, and how large the programs became, are printed as comments.

Run: python -m bench.template_load
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from ipaddress import IPv4Address
from pathlib import Path

from bench import harness
from datapath.constants import EndpointConstants
from datapath.loader import ENDPOINT_OBJECTS, POLICY_MAP, Programs, Template
from tests.support.bpflab import OBJECTS, Lab, lab

ROUNDS = 9
SOURCES = OBJECTS.parent
CONSTANTS = EndpointConstants(1, 301, 1, IPv4Address("10.0.0.1"), "02:00:00:00:00:01")


def load(template: Template, maps: dict[str, int]) -> float:
    """Return how many milliseconds one load takes."""
    start = time.perf_counter()
    programs = template.load(CONSTANTS, maps)
    taken = time.perf_counter() - start
    programs.close()
    return taken * 1e3


def compile_anew(directory: Path) -> float:
    """Return how many milliseconds the compiler takes for the object."""
    start = time.perf_counter()
    subprocess.run(
        ["make", "-s", "-B", "-C", str(SOURCES), f"BUILD={directory}", f"{directory}/{ENDPOINT_OBJECTS[4]}"],
        check=True,
    )
    return (time.perf_counter() - start) * 1e3


def verified(programs: Programs) -> dict[str, str]:
    """Return instructions walked by the verifier, by program; kernels before 5.16 do not say."""
    found = {}
    for name in programs:
        lines = Path(f"/proc/self/fdinfo/{programs[name]}").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        found[name] = fields.get("verified_insns", "?")
    return found


def measure(host: Lab, directory: Path) -> tuple[list[float], list[float]]:
    template = Template.read(OBJECTS / ENDPOINT_OBJECTS[4])
    maps = host.fds | {POLICY_MAP: host.policies[1].fd}
    load(template, maps)  # libbpf probes the kernel once
    loads, compiles = [], []
    for _ in range(ROUNDS):
        loads.append(load(template, maps))
        compiles.append(compile_anew(directory) + load(template, maps))
    return loads, compiles


def main() -> None:
    """Print the figures."""
    harness.load()
    with lab(1) as host, tempfile.TemporaryDirectory() as directory:
        loads, compiles = measure(host, Path(directory))
        harness.emit("template_load_ms", statistics.median(loads), "ms", ROUNDS)
        ratio = statistics.median(compiles) / statistics.median(loads)
        harness.emit("template_vs_compile_ratio", ratio, "ratio", ROUNDS)
        for name, walked in verified(host.programs[1]).items():
            harness.note(f"{name}: {walked} instructions walked by the verifier")


if __name__ == "__main__":
    main()
