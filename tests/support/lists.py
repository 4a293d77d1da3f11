# SPDX-License-Identifier: Apache-2.0
"""A full list as a follower delivers it, for tests of sinks that need no etcd."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from kvstore.watcher import Sink


def deliver_list(sink: Sink, items: Mapping[str, bytes], revision: int) -> None:
    """Hand a sink everything under its prefix, one record at a time."""
    sink.begin_list()
    for item in items.items():
        sink.take([item])
    ending = sink.listed(revision)
    with contextlib.suppress(StopIteration):  # it only lets others run, and here is nobody
        while True:
            ending.send(None)
