# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks: all of them, or those whose module or figure is named.

    python -m bench                            # all
    python -m bench identity_alloc             # a module
    NAME=cli_status_s python -m bench          # the module that prints this figure

Each module runs in a process of its own, so that memory and caches are its own.  One that fails does not
stop the others; the exit status says how many failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench import harness

HERE = Path(__file__).parent


def modules() -> dict[str, str]:
    """Return the benchmarks (modules with a `main`) and their source."""
    sources = {path.stem: path.read_text() for path in sorted(HERE.glob("*.py"))}
    return {
        name: source
        for name, source in sources.items()
        if not name.startswith("_") and 'if __name__ == "__main__":' in source
    }


def chosen(names: list[str]) -> list[str]:
    """Return the modules to run; SystemExit for a name that no module has or prints."""
    found = modules()
    if not names:
        return list(found)
    picked: dict[str, None] = {}
    for name in names:
        matches = [name] if name in found else [each for each, source in found.items() if name in source]
        if not matches:
            raise SystemExit(f"no benchmark is called or prints {name}; there are: {', '.join(found)}")
        picked.update(dict.fromkeys(matches))
    return list(picked)


def main() -> None:
    names = sys.argv[1:] or os.environ.get("NAME", "").split()
    failed = 0
    for name in chosen(names):
        harness.note(f"bench.{name}")
        done = subprocess.run([sys.executable, "-m", f"bench.{name}"], cwd=HERE.parent, check=False)
        if done.returncode:
            harness.note(f"bench.{name} failed with status {done.returncode}")
            failed += 1
    sys.exit(failed)


if __name__ == "__main__":
    main()
