# SPDX-License-Identifier: Apache-2.0
"""The chain HOLDFAST-FORWARD: endpoints' packets pass the host's FORWARD, whatever its policy.

docker, ufw and administrators set iptables' FORWARD to DROP; an nft table of ours could not overrule
that.  So this is an iptables chain, jumped to before every other rule.  The programs have judged each
packet already; what is for no endpoint is none of its business.  docker and ufw put their rules before
ours when they restart, and `ensure` puts the jump back to the top.

Called by: the agent, with `datapath.firewall`.  Speaks to iptables as `iptables-restore`, one atomic
script; the table is that of iptables-nft wherever the host has it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from datapath import command
from datapath.devices import HOST_PREFIX

CHAIN = "HOLDFAST-FORWARD"
_JUMP = f"-A FORWARD -j {CHAIN}"
_RULES = (
    f'-A {CHAIN} -i {HOST_PREFIX}+ -m comment --comment "holdfast: from endpoints" -j ACCEPT',
    f'-A {CHAIN} -o {HOST_PREFIX}+ -m comment --comment "holdfast: to endpoints" -j ACCEPT',
)
_WAIT = ("-w", "5")  # s that iptables waits for another's lock


@dataclass(frozen=True)
class Filter:
    """The parts of a saved filter table that matter here."""

    exists: bool = False
    rules: tuple[str, ...] = ()
    forward: tuple[str, ...] = field(default_factory=tuple)

    @property
    def jumps(self) -> int:
        return self.forward.count(_JUMP)

    def missing(self) -> list[str]:
        """Return what is amiss, one phrase each."""
        amiss = [f"rule {rule}" for rule in _RULES if rule not in self.rules]
        if not amiss and self.rules != _RULES:
            amiss.append(f"foreign rules in {CHAIN}")
        if not self.jumps:
            amiss.append(f"jump from FORWARD to {CHAIN}")
        elif self.forward[0] != _JUMP or self.jumps > 1:
            amiss.append(f"{CHAIN} is not the one first rule of FORWARD")
        return amiss


def parse_filter(saved: str) -> Filter:
    """Return what `iptables-save -t filter` says of our chain and of FORWARD."""
    lines = saved.splitlines()
    return Filter(
        exists=any(line.startswith(f":{CHAIN} ") for line in lines),
        rules=tuple(line for line in lines if line.startswith(f"-A {CHAIN} ")),
        forward=tuple(line for line in lines if line.startswith("-A FORWARD ")),
    )


def install_script(found: Filter) -> str:
    """Return the script that makes chain and jump right, from whatever was found."""
    unhook = [_JUMP.replace("-A", "-D", 1)] * found.jumps
    hook = f"-I FORWARD 1 -j {CHAIN}"
    return _script(f":{CHAIN} - [0:0]", *_RULES, *unhook, hook)


def remove_script(found: Filter) -> str:
    """Return the script that removes chain and jumps."""
    unhook = [_JUMP.replace("-A", "-D", 1)] * found.jumps
    return _script(*unhook, f"-F {CHAIN}", f"-X {CHAIN}")


def _script(*lines: str) -> str:
    return "\n".join(["*filter", *lines, "COMMIT", ""])


class ForwardChain:
    """The chain in the namespace of this process; `tool` is "iptables" or "ip6tables"."""

    def __init__(self, tool: str = "iptables") -> None:
        self.tool = tool
        self._turn = asyncio.Lock()

    async def verify(self) -> list[str]:
        """Return what is missing, one phrase each; empty when all is as wanted.  Raises FirewallError."""
        return (await self._found()).missing()

    async def ensure(self) -> list[str]:
        """Repair chain and jump if anything is amiss; return what was.  Raises FirewallError."""
        async with self._turn:
            found = await self._found()
            amiss = found.missing()
            if amiss:
                await self._restore(install_script(found))
        return amiss

    async def remove(self) -> bool:
        """Remove chain and jumps; return whether there was any.  Raises FirewallError."""
        async with self._turn:
            found = await self._found()
            if not found.exists:
                return False
            await self._restore(remove_script(found))
        return True

    async def _found(self) -> Filter:
        return parse_filter(await command.run([f"{self.tool}-save", "-t", "filter"]))

    async def _restore(self, script: str) -> None:
        await command.run([f"{self.tool}-restore", *_WAIT, "--noflush"], script)
