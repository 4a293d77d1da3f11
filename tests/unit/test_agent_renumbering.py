# SPDX-License-Identifier: Apache-2.0
"""When workloads move to etcd's number: after a pause, at once where the old one means somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent.renumbering import Renumbering
from identity.cache import IdentityCache
from identity.labels import Labels
from tests.support.eventually import eventually

WEB, DB = Labels.parse("container:app=web;"), Labels.parse("container:app=db;")
LONG_S, SHORT_S = 3600.0, 0.05

Moves = list[tuple[Labels, int]]
Story = Callable[[IdentityCache, Renumbering, Moves], Awaitable[None]]


def run(story: Story, *, pause: float) -> None:
    async def main() -> None:
        identities, moves = IdentityCache(), Moves()
        renumbering = Renumbering(identities.table, pause=pause)
        task = asyncio.create_task(renumbering.run(lambda labels, number: moves.append((labels, number))))
        try:
            await story(identities, renumbering, moves)
        finally:
            task.cancel()

    asyncio.run(main())


def test_they_move_after_the_pause_and_once() -> None:
    async def story(_: IdentityCache, renumbering: Renumbering, moves: Moves) -> None:
        renumbering.heard(WEB, 300, 400)
        assert moves == []
        await eventually(lambda: moves == [(WEB, 400)], "the move")
        renumbering.heard(WEB, 400, 500)
        await eventually(lambda: moves == [(WEB, 400), (WEB, 500)], "the next move")

    run(story, pause=SHORT_S)


def test_of_several_numbers_the_last_one_counts() -> None:
    async def story(_: IdentityCache, renumbering: Renumbering, moves: Moves) -> None:
        renumbering.heard(WEB, 300, 400)
        renumbering.heard(WEB, 400, 500)
        await eventually(lambda: moves == [(WEB, 500)], "one move")

    run(story, pause=SHORT_S)


def test_they_move_at_once_where_the_old_number_means_somebody_else() -> None:
    """It may get that meaning during the pause; that it is still theirs is no reason."""

    async def story(identities: IdentityCache, renumbering: Renumbering, moves: Moves) -> None:
        identities.source.upsert(300, WEB)
        renumbering.heard(WEB, 300, 400)
        renumbering.heard(DB, 301, 401)
        await asyncio.sleep(0.05)
        assert moves == []
        identities.source.upsert(300, DB)
        await eventually(lambda: moves == [(WEB, 400)], "the move of the one whose number was taken")

    run(story, pause=LONG_S)
