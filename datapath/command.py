# SPDX-License-Identifier: Apache-2.0
"""Runs nft and iptables: argument lists, a script on standard input, a time limit, errors with their words.

Called by: `datapath.firewall`, `datapath.forward`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from core.errors import shorten
from datapath.errors import FirewallError

TIMEOUT_S = 10.0  # an iptables lock is waited for up to 5 s; a script of 10 000 elements takes 0.2 s


async def run(arguments: Sequence[str], script: str = "", *, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command and return what it printed.

    Raises FirewallError that holds the command, its exit code and its first words; a command that
    outlives `timeout_s` is killed.
    """
    shown = shorten(" ".join(arguments))
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise FirewallError(
            f"{shown} can not be started: {error.strerror}", hint=f"install {arguments[0]}"
        ) from error
    try:
        async with asyncio.timeout(timeout_s):
            out, complaint = await process.communicate(script.encode())
    except TimeoutError as error:
        raise FirewallError(f"{shown} did not end within {timeout_s:g} s") from error
    finally:
        await _end(process)
    if process.returncode:
        words = _words(complaint.decode(errors="replace"))
        raise FirewallError(f"{shown} failed with code {process.returncode}: {words}")
    return out.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what still runs (time limit, cancellation) and collect it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _words(complaint: str) -> str:
    """Return the first complaint with the rule it shows: nft prints the rule, then a line that points."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip(" ^~\t")]
    return shorten(" | ".join(lines[:3]) or "no reason given", 400)
