# SPDX-License-Identifier: Apache-2.0
"""The agent's life: configuration, API, maps and programs, everything else, and an orderly end.

Only a configuration that can not be used ends the process by itself; on a host that has another address now
it begins anew, as the same process.  Whatever the host lacks (a map of another layout, no address, a kernel
that refuses a program) is said in status and in the log, and tried again; what is pinned and attached
enforces meanwhile.

    python -m agent [--option value …]

Called by: agent.start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from loguru import logger

from agent.api.errors import Conflict
from agent.api.server import ApiServer, refuse_if_alive
from agent.configuration import load_config
from agent.events import EventPump
from agent.gate import Gates
from agent.limit_settings import limits_of
from agent.limits import Limits
from agent.parts import Parts, build
from agent.process import AgentProcess
from agent.programs import HostPrograms
from agent.tasks import node_now, start
from core import log, metrics
from core.backoff import Backoff
from core.errors import HoldfastError
from core.loop import new_event_loop, spare_the_collector
from core.options import Config
from core.supervisor import Supervisor
from core.waiting import waiting
from prestart.handover import Handover

EXIT_CONFIG = 2
# Seconds that etcd has to take back what is no longer so.
WITHDRAW_S = 5.0

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit code."""
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
        handover = Handover.read(os.environ)
    except HoldfastError as error:
        sys.stderr.write(f"Error: {error}\n")
        return EXIT_CONFIG
    _set_up_logging(config)
    metrics.CONFIG_HASH.set(int(config.hash[:13], 16))
    logger.info("configuration {} read", config.hash[:12])
    spare_the_collector()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        moved = runner.run(run(config, handover))
    if moved:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return 0


async def run(config: Config, handover: Handover) -> bool:
    """Run until a signal, or until the host is no longer known by its addresses, which returns True.

    `handover` is what the start hook said.  The kernel's state stays in force afterwards.
    """
    ended, asked, moved = asyncio.Event(), asyncio.Event(), False

    def ask() -> None:
        asked.set()
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ask)
    supervisor = Supervisor()
    events = EventPump(_queue_size(config))
    process = AgentProcess(config, supervisor, events.hub, Gates(handover))
    limits = Limits(limits_of(config["api-rate-limit"]))
    server = ApiServer(process, config["socket-path"], config["prometheus-serve-addr"], limits)
    starting = asyncio.create_task(_start(process, server, events, ended), name="start")
    try:
        await ended.wait()
        moved = not asked.is_set()
        logger.info("{}; what is in the kernel stays in force", "moved" if moved else "asked to stop")
        if process.parts is not None and process.parts.engine_watch is not None:
            await process.parts.engine_watch.last_calls()
    finally:
        starting.cancel()
        await asyncio.wait({starting})
        await supervisor.stop()
        if moved and process.parts is not None:
            await _withdraw(process.parts)
        await _close(process.parts, events)
    return moved


async def _withdraw(parts: Parts) -> None:
    """Take back what this host has said of itself: it is wrong, and who reads it sends to nobody.

    The session runs no more, so nothing comes back.
    """
    try:
        async with asyncio.timeout(WITHDRAW_S):
            await parts.session.revoke()
    except (HoldfastError, TimeoutError) as error:
        logger.warning("what was said under the former address stays until its lease is given up: {}", error)


async def _start(process: AgentProcess, server: ApiServer, events: EventPump, ended: asyncio.Event) -> None:
    """Serve the API, then build and start the parts; set `ended` when they have to begin anew."""
    config = process.config
    await _alone(config["socket-path"])
    process.supervisor.start("api", server.run)
    programs = await _patiently(process, lambda: asyncio.to_thread(HostPrograms.open, config))
    events.attach(programs.maps.ring, programs.maps.monitor, programs.maps.lost)

    async def build_and_start() -> Parts:
        parts = await build(config, events, programs, process.gates, server.limits)
        start(parts, process.supervisor)
        return parts

    process.parts = await _patiently(process, build_and_start)
    await process.parts.keeper.moved.wait()
    ended.set()


async def _patiently(process: AgentProcess, step: Callable[[], Awaitable[T]]) -> T:
    """Try a step again for as long as the host lacks something; status says what."""
    backoff = Backoff(base=1.0, cap=30.0)
    while True:
        try:
            return await step()
        except (HoldfastError, OSError) as error:
            process.trouble = str(error)
            logger.error("the agent can not start yet: {}", error)
        except Exception as error:  # noqa: BLE001 - the rim: nobody else would say that the start has failed
            process.trouble = f"{type(error).__name__}: {error}"
            logger.opt(exception=error).error("the agent can not start yet: {}", process.trouble)
        with waiting("this host", "start") as wait:
            wait.note = process.trouble
            await asyncio.sleep(backoff.next())


async def _alone(path: Path) -> None:
    """Return once no other agent serves the socket: two would fight over everything that a host has once."""
    backoff = Backoff(base=0.5, cap=10.0)
    said = ""
    with waiting(f"the agent that serves {path}", "its end") as wait:
        while True:
            try:
                return await asyncio.to_thread(refuse_if_alive, path)
            except Conflict as error:
                wait.note = str(error)
                if said != wait.note:
                    logger.error("this agent does nothing for now: {}", error)
                said = wait.note
            await asyncio.sleep(backoff.next())


async def _close(parts: Parts | None, events: EventPump) -> None:
    events.detach()
    if parts is None:
        return
    await parts.endpoints.stop()
    with contextlib.suppress(OSError):
        parts.checkpoint.save_node(node_now(parts))
    await parts.memory.write()
    parts.memory.close()
    with contextlib.suppress(HoldfastError):
        await parts.client.close()
    if parts.engine is not None:
        await parts.engine.close()
    await parts.netlink.close()


def _set_up_logging(config: Config) -> None:
    given = config["log-opt"]
    log.setup(
        config["log-driver"],
        "DEBUG" if config["debug"] else given.get("level", "INFO").upper(),
        given.get("syslog.address", "/dev/log"),
        given.get("syslog.facility", "local5"),
    )


def _queue_size(config: Config) -> int:
    return int(config["monitor-queue-size"]) or min(1024 * (os.cpu_count() or 1), 16384)
