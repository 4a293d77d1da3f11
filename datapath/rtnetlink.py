# SPDX-License-Identifier: Apache-2.0
"""What Holdfast uses of pyroute2, without the rest of it.

`import pyroute2` brings its network database, IPVS, ethtool, wireless and a hundred other modules: 6 MB and a
tenth of a second of every agent, for nothing.  The package's front is passed by while its parts are imported,
and is then as it was: whoever imports pyroute2 later gets all of it.

Used by: datapath.netlink, datapath.hostflows, agent.host.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

PACKAGE = "pyroute2"


@contextlib.contextmanager
def _without_front() -> Iterator[None]:
    """Import submodules of the package without running its `__init__`."""
    spec = importlib.util.find_spec(PACKAGE)
    if PACKAGE in sys.modules or spec is None or spec.submodule_search_locations is None:
        yield
        return
    front = ModuleType(PACKAGE)
    front.__spec__, front.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules[PACKAGE] = front
    try:
        yield
    finally:
        del sys.modules[PACKAGE]


with _without_front():
    from pyroute2.conntrack import AsyncConntrack, NFCTAttrTuple
    from pyroute2.iproute.linux import AsyncIPRoute, IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

__all__ = ["AsyncConntrack", "AsyncIPRoute", "IPRoute", "NFCTAttrTuple", "NetlinkError"]
