# SPDX-License-Identifier: Apache-2.0
"""Containers that the engine could not start because the network driver was late: started again, once.

After a boot, or a restart of an engine without live-restore, the engine starts its containers all at once,
the agent's among them.  It asks the driver for at most half a minute; a container that then got no network
stays exited, whatever its restart policy says: that is for containers that ran.

Only what the engine itself would have started (restart policy always or unless-stopped) and what failed for
want of this driver is started again.  Called by: agent.engine_watch, with each list.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from loguru import logger

from agent.engine import Engine, EngineContainer
from agent.errors import EngineError
from core import metrics
from core.errors import shorten

KEPT_RUNNING = frozenset({"always", "unless-stopped"})
# "failed to add endpoint: legacy plugin: …", "… /run/docker/plugins/holdfast.sock: connect: …", "failed to
# create endpoint web on network hf: NetworkDriver.CreateEndpoint: …", 'plugin "holdfast" not found'.
_OF_A_DRIVER = re.compile(r"plugins?[/ ]|plugins%2F|NetworkDriver\.|Plugin\.Activate", re.IGNORECASE)


class LateStarts:
    """Looks at each exited container once, until it has run again; one for each connection to the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._looked: set[str] = set()

    async def start_again(self, containers: Sequence[EngineContainer], networks: Collection[str]) -> None:
        """Start those that failed for want of the driver; what the engine refuses is logged and left."""
        exited = [
            each for each in containers if each.state == "exited" and not each.networks.isdisjoint(networks)
        ]
        self._looked &= {each.id for each in exited}
        for each in exited:
            if each.id not in self._looked:
                self._looked.add(each.id)
                await self._look(each)

    async def _look(self, container: EngineContainer) -> None:
        try:
            end = await self._engine.end_of(container.id)
        except EngineError as error:
            self._looked.discard(container.id)  # busy starting it, perhaps: it is asked with the next list
            logger.warning("how container {} ended can not be told yet: {}", container.name, error)
            return
        try:
            if end is None or end.restart_policy not in KEPT_RUNNING or not _OF_A_DRIVER.search(end.error):
                return
            logger.warning(
                "container {} was left exited when this driver was late ({}): started again",
                container.name,
                shorten(end.error),
            )
            await self._engine.start(container.id)
        except EngineError as error:
            metrics.LATE_STARTS.labels("failure").inc()
            logger.error("container {} was not started again: {}", container.name, error)
        else:
            metrics.LATE_STARTS.labels("success").inc()
