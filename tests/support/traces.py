# SPDX-License-Identifier: Apache-2.0
"""What endpoints leave on a host, so that a test can say that one has left nothing."""

from __future__ import annotations

import json
from typing import Any

from tests.support.agent import AgentHost

PINS = "/sys/fs/bpf/tc/globals"


def traces(host: AgentHost) -> dict[str, Any]:
    """Return records, addresses, interfaces, routes, maps, files and keys of a host's endpoints."""
    links: list[Any] = json.loads(host.exec("ip", "-j", "link").stdout)
    routes: list[Any] = json.loads(host.exec("ip", "-j", "route").stdout)
    return {
        "endpoints": [each["id"] for each in host.api("/v1/endpoint")],
        "used": host.api("/v1/healthz")["ipam"]["used"],
        "links": sorted(each["ifname"] for each in links),
        "routes": sorted(each["dst"] for each in routes),
        "pins": sorted(host.exec("ls", PINS).stdout.split()),
        "files": sorted(path.name for path in host.state.glob("*/*")),
        "keys": sorted(host.keys("cilium/state/ip/")),
    }
