# SPDX-License-Identifier: Apache-2.0
"""Numeric identities: which number means what, and which a cluster may hand out.

Bits 0-15 are the identity inside a cluster, 16-23 the cluster's id, bit 24 marks a number that only
this host knows (an address prefix).  0 is unknown, 1-127 are reserved by Cilium, 128-255 by the user.

Called by everything that handles identities; pure.
"""

from __future__ import annotations

from typing import Final

from identity.errors import NumberError
from identity.labels import RESERVED as RESERVED_SOURCE
from identity.labels import Label, Labels

UNKNOWN: Final = 0
HOST: Final = 1
WORLD: Final = 2
UNMANAGED: Final = 3
HEALTH: Final = 4
INIT: Final = 5
REMOTE_NODE: Final = 6
KUBE_APISERVER: Final = 7

FIRST_USER_RESERVED: Final = 128
FIRST_ALLOCATED: Final = 256

CLUSTER_SHIFT: Final = 16
CLUSTER_MAX: Final = 255
LOCAL_FLAG: Final = 1 << 24
LOCAL_MAX: Final = LOCAL_FLAG | 0xFFFF
NUMBER_MAX: Final = (1 << 32) - 1

NAMES: Final[dict[int, str]] = {
    HOST: "host",
    WORLD: "world",
    UNMANAGED: "unmanaged",
    HEALTH: "health",
    INIT: "init",
    REMOTE_NODE: "remote-node",
    KUBE_APISERVER: "kube-apiserver",
}
RESERVED: Final[dict[int, Labels]] = {
    number: Labels([Label(RESERVED_SOURCE, name)]) for number, name in NAMES.items()
}
BY_NAME: Final[dict[str, int]] = {name: number for number, name in NAMES.items()}


def allocation_range(cluster_id: int) -> range:
    """Return the numbers that the cluster `cluster_id` (0-255) hands out; NumberError for another id.

    256…65535 for cluster 0, else the whole 65 536 numbers of that cluster.
    """
    if not 0 <= cluster_id <= CLUSTER_MAX:
        raise NumberError(f"cluster id {cluster_id} is not one of 0 to {CLUSTER_MAX}")
    first = cluster_id << CLUSTER_SHIFT
    return range(first or FIRST_ALLOCATED, (cluster_id + 1) << CLUSTER_SHIFT)


def is_reserved(number: int) -> bool:
    """True for the numbers that are never allocated: 0-255."""
    return 0 <= number < FIRST_ALLOCATED


def is_local(number: int) -> bool:
    """True for a number that only this host knows (an address prefix)."""
    return bool(number & LOCAL_FLAG)


def cluster_of(number: int) -> int:
    """Return the cluster id a global number belongs to."""
    return (number >> CLUSTER_SHIFT) & CLUSTER_MAX


def is_global(number: int) -> bool:
    """True for a number that some cluster may have allocated, so one that etcd may hold."""
    return FIRST_ALLOCATED <= number < LOCAL_FLAG
