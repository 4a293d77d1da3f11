# SPDX-License-Identifier: Apache-2.0
"""Policies in etcd: written, listed and deleted for `holdfast policy`.

Everything of one command is written at one revision where it fits into a transaction, so that no agent
sees half of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any

from cli.errors import Missing
from kvstore import schema
from kvstore.client import Client
from kvstore.ops import Delete, Put

Json = dict[str, Any]


async def write_all(client: Client, texts: Mapping[str, str]) -> list[Json]:
    """Write name → text; return what happened to each."""
    keys = {name: schema.policy_key(name) for name in texts}
    old = dict(zip(texts, await asyncio.gather(*map(client.get, keys.values())), strict=True))
    new = {name: schema.encode_policy(text) for name, text in texts.items()}
    changed = [name for name, before in old.items() if before is None or before.value != new[name]]
    revision = await client.write_many([Put(keys[name], new[name]) for name in changed])
    return [_result(name, name in changed, old[name] is not None, revision) for name in texts]


def _result(name: str, changed: bool, existed: bool, revision: int) -> Json:
    verb = ("updated" if existed else "created") if changed else "unchanged"
    change = f"{verb} in etcd at revision {revision}" if changed else "unchanged"
    return {"name": name, "change": change, "revision": revision if changed else 0}


async def delete_all(client: Client, names: Iterable[str]) -> list[str]:
    """Delete the named policies, or all when no name is given; Missing when one does not exist."""
    present = [kv.key for kv in (await client.list(schema.POLICIES, keys_only=True)).items]
    wanted = {schema.policy_key(name): name for name in names}
    absent = [name for key, name in wanted.items() if key not in present]
    if absent:
        raise Missing(f"there is no policy {absent[0]} in etcd", hint="nothing was deleted")
    keys = list(wanted) or present
    await client.write_many([Delete(key) for key in keys])
    return [key.removeprefix(schema.POLICIES) for key in keys]


async def in_store(client: Client, names: Iterable[str]) -> list[str]:
    """Return those of the names that etcd has."""
    wanted = list(names)
    found = await asyncio.gather(*(client.get(schema.policy_key(name)) for name in wanted))
    return [name for name, kv in zip(wanted, found, strict=True) if kv is not None]


async def stored(client: Client) -> Json:
    """Return what etcd holds in the shape of the agent's repository."""
    listing = await client.list(schema.POLICIES)
    policies = [_stored(kv.key, kv.value) for kv in listing.items]
    return {"revision": listing.revision, "policies": policies, "errors": []}


def _stored(key: str, value: bytes) -> Json:
    name, text = schema.parse_policy(key, value)
    try:
        document = json.loads(text)
    except ValueError:  # somebody wrote YAML with etcdctl: shown as it is
        document = text
    return {"name": name, "origin": key, "source": "etcd", "document": document}
