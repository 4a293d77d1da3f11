# SPDX-License-Identifier: Apache-2.0
"""A version of Holdfast that does not exist yet: this one with more fields, and newer versions of its files.

What a later version may do to its records is done here to the source: fields that this one does not know, in
etcd and in the checkpoint, and another layout of the view file.  Used by tests/chaos.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.support.host import REPO

PACKAGES = (
    *("agent", "certs", "cli", "core", "datapath", "external_resources"),
    *("identity", "kvstore", "policy", "prestart"),
)
# File → (text of this version, what stands there in the next one).
CHANGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "kvstore/schema/node.py": (
        (
            '    wireguard_key: str = msgspec.field(name="WireguardPubKey", default="")\n',
            '    wireguard_key: str = msgspec.field(name="WireguardPubKey", default="")\n'
            '    next: str = msgspec.field(name="HoldfastNext", default="of a node")\n',
        ),
    ),
    "kvstore/schema/ip.py": (
        (
            '    metadata: str = msgspec.field(name="Metadata", default="")\n',
            '    metadata: str = msgspec.field(name="Metadata", default="")\n'
            '    next: str = msgspec.field(name="HoldfastNext", default="of an address")\n',
        ),
    ),
    "agent/endpoint.py": (
        (
            "    ports: tuple[Port, ...] = ()\n",
            "    ports: tuple[Port, ...] = ()\n"
            '    next: tuple[str, ...] = msgspec.field(default_factory=lambda: ("x",))\n',
        ),
    ),
    "agent/checkpoint.py": (("\nVERSION = 1\n", "\nVERSION = 2\n"),),
    "agent/viewfile.py": (("\nVERSION = 3\n", "\nVERSION = 4\n"),),
}


def next_version(directory: Path) -> Path:
    """Write the next version's source into a directory; return what to put on PYTHONPATH."""
    root = directory / "next"
    for package in PACKAGES:
        shutil.copytree(REPO / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "bpf").symlink_to(REPO / "bpf")
    for name, changes in CHANGES.items():
        path = root / name
        text = path.read_text()
        for old, new in changes:
            if text.count(old) != 1:
                raise AssertionError(f"{name} has {text.count(old)} times {old!r}")
            text = text.replace(old, new)
        path.write_text(text)
    return root
