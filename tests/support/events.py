# SPDX-License-Identifier: Apache-2.0
"""Batches of the data path's events, decoded whole: what a test looks at, and the agent never needs."""

from __future__ import annotations

from collections.abc import Iterable

from datapath.errors import EventError
from datapath.events import Event, decode


def decode_many(records: Iterable[bytes]) -> tuple[list[Event], int]:
    """Return the events of a batch in order, and how many records were none."""
    events: list[Event] = []
    refused = 0
    for record in records:
        try:
            events.append(decode(record))
        except EventError:
            refused += 1
    return events, refused
