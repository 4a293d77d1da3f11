# SPDX-License-Identifier: Apache-2.0
"""How the agent's process begins: everything is imported once, quickly, then `agent.main` runs.

Imports are most of the second that a start takes.  Two things in them are for nothing and are left out:
looking for garbage among what they make, and the certificates of all the world's authorities, which the
HTTP library reads when it is imported.  The agent speaks HTTP over unix sockets only, and etcd's authority
is named in its configuration.

Called by: `python -m agent` and `holdfast agent`.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence

AUTHORITIES = "SSL_CERT_FILE"  # where OpenSSL reads them from by default


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until it is asked to stop; return the exit code."""
    with _only_what_is_needed():
        from agent.main import main as run

    return run(argv)


@contextlib.contextmanager
def _only_what_is_needed() -> Iterator[None]:
    named = os.environ.get(AUTHORITIES)
    os.environ[AUTHORITIES] = os.devnull
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        del os.environ[AUTHORITIES]
        if named is not None:
            os.environ[AUTHORITIES] = named
