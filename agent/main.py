# SPDX-License-Identifier: Apache-2.0
"""The agent's life: configuration, API, maps and programs, everything else, and an orderly end.

Only a configuration that can not be used ends the process by itself.  Whatever the host lacks (a map of
another layout, no address, a kernel that refuses a program) is said in status and in the log, and tried
again; what is pinned and attached enforces meanwhile.

    python -m agent [--option value …]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from loguru import logger

from agent.api.server import ApiServer
from agent.configuration import load_config
from agent.events import EventPump
from agent.gate import Gates
from agent.parts import Parts, build, start
from agent.process import AgentProcess
from agent.programs import HostPrograms
from core import log, metrics
from core.backoff import Backoff
from core.errors import HoldfastError
from core.options import Config
from core.supervisor import Supervisor
from core.waiting import waiting
from prestart.handover import Handover

EXIT_CONFIG = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit code."""
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
    except HoldfastError as error:
        sys.stderr.write(f"Error: {error}\n")
        return EXIT_CONFIG
    _set_up_logging(config)
    metrics.CONFIG_HASH.set(int(config.hash[:13], 16))
    logger.info("configuration {} read", config.hash[:12])
    asyncio.run(run(config))
    return 0


async def run(config: Config) -> None:
    """Run until a signal; the kernel's state stays in force afterwards."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    supervisor = Supervisor()
    events = EventPump(_queue_size(config))
    process = AgentProcess(config, supervisor, events.hub)
    server = ApiServer(process, config["socket-path"], config["prometheus-serve-addr"])
    supervisor.start("api", server.run)
    gates = Gates(Handover.read(os.environ))
    building = asyncio.create_task(_build(process, config, events, gates), name="build")
    try:
        await ended.wait()
        logger.info("asked to stop; what is in the kernel stays in force")
    finally:
        building.cancel()
        await asyncio.wait({building})
        await supervisor.stop()
        await _close(process.parts, events)


async def _build(process: AgentProcess, config: Config, events: EventPump, gates: Gates) -> None:
    """Build and start the parts, trying again for as long as the host lacks something."""
    backoff = Backoff(base=1.0, cap=30.0)
    programs: HostPrograms | None = None
    while process.parts is None:
        try:
            if programs is None:
                programs = await asyncio.to_thread(HostPrograms.open, config)
                maps = programs.maps
                events.attach(maps.ring, maps.monitor, maps.lost)
            parts = await build(config, events, programs, gates)
        except (HoldfastError, OSError) as error:
            process.trouble = str(error)
            logger.error("the agent can not start yet: {}", error)
            with waiting("this host", "start") as wait:
                wait.note = str(error)
                await asyncio.sleep(backoff.next())
            continue
        start(parts, process.supervisor)
        process.parts = parts


async def _close(parts: Parts | None, events: EventPump) -> None:
    events.detach()
    if parts is None:
        return
    await parts.endpoints.stop()
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
