# SPDX-License-Identifier: Apache-2.0
"""Followers of nobody: for tests of what is fed by one, and of what is kept of it."""

from __future__ import annotations

from typing import Any, cast

from kvstore.client import Client
from kvstore.sink import TableSink
from kvstore.watcher import Follower


def follower(prefix: str, sink: TableSink[Any, Any]) -> Follower:
    """Return a follower that is never run; a test says itself where it stands."""
    return Follower(cast(Client, None), prefix, sink)
