# SPDX-License-Identifier: Apache-2.0
"""Commands are ended, collected, and quoted when they fail."""

from __future__ import annotations

import asyncio

import pytest

from datapath.command import run
from datapath.errors import FirewallError


async def test_output_of_a_script() -> None:
    assert await run(["cat"], "table ip x {}\n") == "table ip x {}\n"


async def test_missing_command_is_named() -> None:
    with pytest.raises(FirewallError, match=r"no-such-nft -f - can not be started: No such file.*install"):
        await run(["no-such-nft", "-f", "-"])


async def test_failure_says_code_and_rule() -> None:
    script = "echo '/dev/stdin:1:1-4: Error: syntax error' >&2; echo 'oops rule' >&2; echo '^^^^' >&2; exit 3"
    with pytest.raises(FirewallError, match=r"code 3: /dev/stdin:1:1-4: Error: syntax error \| oops rule$"):
        await run(["sh", "-c", script])


async def test_time_limit_kills() -> None:
    with pytest.raises(FirewallError, match=r"sleep 60 did not end within 0.1 s"):
        await run(["sleep", "60"], timeout_s=0.1)


async def test_cancellation_kills() -> None:
    task = asyncio.create_task(run(["sleep", "60"]))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
