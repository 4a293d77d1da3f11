# SPDX-License-Identifier: Apache-2.0
"""Everything of a host that the agent might change, as text: to compare before it came and after it went."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.support.host import Host

# What changes by itself: counters of rules, times, the numbers of devices.
_VOLATILE = (
    (re.compile(r"\[\d+:\d+\]"), "[]"),
    (re.compile(r"packets \d+ bytes \d+"), ""),
    (re.compile(r"^#.*\n", re.MULTILINE), ""),
)
_COMMANDS = {
    "iptables": ("iptables-save",),
    "ip6tables": ("ip6tables-save",),
    "nft": ("nft", "list", "ruleset"),
    "routes": ("ip", "route", "show", "table", "all"),
    "routes of IPv6": ("ip", "-6", "route", "show", "table", "all"),
    "routing rules": ("ip", "rule"),
    "permanent neighbours": ("ip", "neigh", "show", "nud", "permanent"),
    "pins": ("find", "/sys/fs/bpf", "-mindepth", "1"),
}


def taken(host: Host) -> dict[str, str]:
    """Return name → text of everything."""
    found = {name: _still(host.exec(*command).stdout) for name, command in _COMMANDS.items()}
    devices = _devices(host)
    found["devices"] = "\n".join(devices)
    for device in devices:
        for place in ("qdisc show dev {}", "filter show dev {} ingress", "filter show dev {} egress"):
            words = place.format(device.split()[0]).split()
            found[f"tc {' '.join(words)}"] = _still(host.exec("tc", *words, check=False).stdout)
    return found


def _still(text: str) -> str:
    for volatile, instead in _VOLATILE:
        text = volatile.sub(instead, text)
    return text


def _devices(host: Host) -> list[str]:
    """Return each device with its addresses."""
    shown: list[Any] = json.loads(host.exec("ip", "-j", "address").stdout)
    return [
        " ".join([each["ifname"], *(f"{one['local']}/{one['prefixlen']}" for one in each["addr_info"])])
        for each in shown
    ]


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return what differs, a line each."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = (each.get(name, "").splitlines() for each in (before, after))
        found += [f"{name}: lost {line!r}" for line in old if line not in new]
        found += [f"{name}: new {line!r}" for line in new if line not in old]
        if not found and old != new:
            found.append(f"{name}: another order: {old} became {new}")
    return found
