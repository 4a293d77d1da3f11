# SPDX-License-Identifier: Apache-2.0
"""What map entries are to the rest of Holdfast: frozen records with addresses and ports as people write
them, ports in host order.  Called by: everyone who reads or writes maps through `datapath.maps`.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

ENDPOINT_IS_HOST = 1  # LxcEntry.flags: the address is the host's own


class LxcEntry(NamedTuple):
    """One local endpoint, by its address; `node_mac` is the host-side device's."""

    ifindex: int
    endpoint_id: int
    flags: int
    mac: str
    node_mac: str


class IpcacheEntry(NamedTuple):
    """Who an address is: `tunnel_endpoint` is the IPv4 address of its host, "0.0.0.0" when not tunnelled."""

    identity: int
    tunnel_endpoint: str = "0.0.0.0"
    key: int = 0


# An IpcacheEntry, or any tuple of its shape: those are made in a fifth of the time.
RawIpcacheEntry = tuple[int, str, int]


class PolicyKey(NamedTuple):
    """What a policy entry speaks of; 0 means any.  ICMP types stand in `dport`."""

    identity: int
    dport: int
    protocol: int
    direction: int  # 0 ingress, 1 egress


class PolicyEntry(NamedTuple):
    """What is done; `proxy_port` 0 means no proxy.

    `until` is the second of CLOCK_MONOTONIC from which an entry for all traffic counts for nothing, or 0.
    """

    deny: bool
    proxy_port: int = 0
    until: int = 0


class PolicyCounters(NamedTuple):
    """One entry of a policy map as it stands in the kernel."""

    key: PolicyKey
    entry: PolicyEntry
    packets: int
    bytes: int


class CtFlags(enum.IntFlag):
    """CtKey.flags: how the flow was seen; OUT is the absence of IN."""

    IN = 1
    RELATED = 2
    SERVICE = 4


class CtKey(NamedTuple):
    """One flow: from `source` to `destination`, as its first packet was sent."""

    source: str
    destination: str
    source_port: int
    destination_port: int
    protocol: int
    flags: int


class CtEntry(NamedTuple):
    """State of one flow.  `lifetime` is seconds of CLOCK_MONOTONIC, `bits` are layouts.CT_BITS."""

    rx_packets: int
    rx_bytes: int
    tx_packets: int
    tx_bytes: int
    lifetime: int
    bits: int
    rev_nat_index: int
    ifindex: int
    tx_flags_seen: int
    rx_flags_seen: int
    source_identity: int
    last_tx_report: int
    last_rx_report: int


class MetricsKey(NamedTuple):
    """`reason` 0 is forwarded, else why not (datapath.reasons).

    `direction` is 1 for ingress, 2 for egress, 3 for services.
    """

    reason: int
    direction: int


class MetricsValue(NamedTuple):
    """Packets and bytes over all CPUs."""

    packets: int
    bytes: int
