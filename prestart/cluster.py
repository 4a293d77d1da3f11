# SPDX-License-Identifier: Apache-2.0
"""The side file of the checkpoint, ``<state-dir>/cluster.json``: what a start needs to know of the cluster.

The agent writes it (with `encode` and `core.files.write_atomic`) whenever the set of nodes changes and with
each checkpoint; this package reads it, because the checkpoint itself may be hundreds of megabytes.

    {"version": 1, "nodes": 3, "names": ["a", "b", "c"], "revision": 4711}

`names` and `revision` (etcd's, from which the checkpoint's watch resumes) may be missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from core.errors import shorten
from core.files import StrPath
from prestart.decision import Cluster
from prestart.errors import StateRefused

FILE = "cluster.json"
VERSION = 1
MOST_NODES = 1_000_000


def encode(names: Sequence[str], *, nodes: int | None = None, revision: int = 0) -> bytes:
    """Return the file for the nodes `names`; `nodes` is their number where the names are not at hand."""
    content = {
        "version": VERSION,
        "nodes": len(names) if nodes is None else nodes,
        "names": sorted(names),
        "revision": revision,
    }
    return json.dumps(content).encode()


def parse(data: bytes, origin: str) -> Cluster:
    """Return what the file says; StateRefused names `origin` and what is wrong with it."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateRefused(f"{origin} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StateRefused(f"{origin} is not a JSON object")
    if content.get("version", VERSION) != VERSION:
        raise StateRefused(f"{origin} has version {shorten(content['version'])}, not {VERSION}")
    return Cluster(
        _whole(content, "nodes", 1, MOST_NODES, origin),
        _names(content.get("names", []), origin),
        _whole(content, "revision", 0, 2**63 - 1, origin) if "revision" in content else 0,
    )


def load(directory: StrPath) -> Cluster | None:
    """Return the cluster as the agent last saw it, None on a host that has no checkpoint."""
    path = os.path.join(directory, FILE)
    try:
        with open(path, "rb") as file:
            return parse(file.read(), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateRefused(f"{path} can not be read: {error.strerror}") from error


def _whole(content: dict[str, object], name: str, low: int, high: int, origin: str) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise StateRefused(f"{origin}: {name} is {shorten(value)}, not a whole number from {low} to {high}")
    return value


def _names(value: object, origin: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise StateRefused(f"{origin}: names is {shorten(value)}, not a list of texts")
    return tuple(value)
