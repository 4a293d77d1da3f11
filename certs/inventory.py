# SPDX-License-Identifier: Apache-2.0
"""The inventory of a fleet: who gets a certificate, and where etcd is.  Pure but for reading the file.

    members:                                  # etcd's machines; it listens on the first address
      etcd-1: 10.0.0.1
      etcd-2: [10.0.0.2, etcd-2.example.org]
      etcd-3: 10.0.0.3
    hosts: [web-1, web-2]                     # machines with an agent, by host name
    operators: [admin]
    settings: {snapshot-keep: 20}             # of compose/kvstore, on all members

An error names file, field and value.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from certs.errors import BadRequest, Missing
from certs.issue import general_name
from core.errors import shorten

CLIENT_PORT, PEER_PORT = 2379, 2380
FIELDS = ("members", "hosts", "operators", "settings")
# What may stand in `settings`, and the variable of compose/kvstore that it becomes.
SETTINGS = {
    "quota": "HOLDFAST_ETCD_QUOTA",  # bytes
    "snapshot-interval": "HOLDFAST_SNAPSHOT_INTERVAL",
    "snapshot-keep": "HOLDFAST_SNAPSHOT_KEEP",
    "directory": "HOLDFAST_ETCD_DIR",
}
# Stricter than a common name: it also is a folder's, and a part of lists and of keys in etcd.
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,50}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Inventory:
    """Members with their addresses, hosts and operators by name, settings of members by variable."""

    members: Mapping[str, tuple[str, ...]]
    hosts: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def endpoints(self) -> list[str]:
        """etcd's URLs for clients."""
        return [f"https://{bracketed(each[0])}:{CLIENT_PORT}" for each in self.members.values()]

    @property
    def peers(self) -> str:
        """The members as etcd's --initial-cluster has them."""
        return ",".join(
            f"{name}=https://{bracketed(each[0])}:{PEER_PORT}" for name, each in self.members.items()
        )


def load(path: Path) -> Inventory:
    """Read an inventory; Missing or BadRequest."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Missing(f"{path} can not be read: {error}") from error
    except yaml.YAMLError as error:
        raise BadRequest(f"{path} is not YAML: {shorten(str(error), 300)}") from error
    if not isinstance(content, dict) or not content:
        raise BadRequest(f"{path} holds no {', '.join(FIELDS)}")
    unknown = sorted(map(str, content.keys() - set(FIELDS)))
    if unknown:
        raise BadRequest(f"{path}: unknown field {shorten(unknown[0])!r}", hint=f"known: {', '.join(FIELDS)}")
    return Inventory(
        _members(path, content.get("members")),
        _names(path, content, "hosts"),
        _names(path, content, "operators"),
        _settings(path, content.get("settings") or {}),
    )


def member_settings(inventory: Inventory, member: str, token: str) -> str:
    """Return the settings of compose/kvstore for one member, a line each."""
    settings = {
        "HOLDFAST_MEMBER": member,
        "HOLDFAST_MEMBER_ADDRESS": bracketed(inventory.members[member][0]),
        "HOLDFAST_MEMBERS": inventory.peers,
        "HOLDFAST_CLUSTER_TOKEN": token,
        **inventory.settings,
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join(["# Made by `holdfast certs fleet`, for compose/kvstore.", *lines, ""])


def bracketed(address: str) -> str:
    """Return an address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address


def _members(path: Path, value: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict) or not value:
        raise BadRequest(f"{path}: members is {shorten(value)}, not names with addresses", hint="a: 10.0.0.1")
    members: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for name, addresses in value.items():
        _check_name(path, "members", name)
        members[name] = _addresses(path, name, addresses)
        for address in members[name]:
            if owner.setdefault(address, name) != name:
                raise BadRequest(f"{path}: {owner[address]} and {name} both have the address {address}")
    return members


def _addresses(path: Path, name: str, value: object) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    listed = [each for each in given if isinstance(each, str)]
    if not listed or listed != given:
        raise BadRequest(f"{path}: members: {name} is {shorten(value)}, not an address or a list of them")
    for each in listed:
        general_name(each)
    try:
        first = str(ipaddress.ip_address(listed[0]))
    except ValueError as error:
        raise BadRequest(
            f"{path}: members: {name}: {listed[0]} is not an IP address", hint="etcd listens on the first one"
        ) from error
    return (first, *listed[1:])


def _names(path: Path, content: Mapping[str, object], field: str) -> tuple[str, ...]:
    value = content.get(field) or []
    if not isinstance(value, list):
        raise BadRequest(f"{path}: {field} is {shorten(value)}, not a list of names")
    for each in value:
        _check_name(path, field, each)
    twice = [each for each in value if value.count(each) > 1]
    if twice:
        raise BadRequest(f"{path}: {field}: {twice[0]} is there twice")
    return tuple(value)


def _settings(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BadRequest(f"{path}: settings is {shorten(value)}, not names with values")
    for name, each in value.items():
        if name not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise BadRequest(f"{path}: settings: unknown {shorten(name)}", hint=f"known: {known}")
        if not re.fullmatch(r"[A-Za-z0-9./_-]+", str(each)):
            raise BadRequest(f"{path}: settings: {name} can not be {shorten(each)}")
    return {SETTINGS[name]: str(each) for name, each in value.items()}


def _check_name(path: Path, field: str, name: object) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadRequest(
            f"{path}: {field}: {shorten(name)} can not be a name",
            hint="up to 52 letters, digits, dots and dashes",
        )
