# SPDX-License-Identifier: Apache-2.0
"""etcd for commands: which credentials, one client for the length of a command.

Commands that write use the operator's certificate; those that read may use the agent's, which every host has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.errors import Missing, Unreachable

if TYPE_CHECKING:
    from kvstore.client import Client

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# Libraries wait for etcd as long as it takes; a person does not.
TIMEOUT_S = 60.0
OPERATOR_CONFIG = Path("/etc/holdfast/operator/etcd.config")
AGENT_CONFIG = Path("/etc/holdfast/etcd.config")


def etcd_option(function: F) -> F:
    """Add ``--etcd-config``."""
    return click.option(
        "--etcd-config",
        type=click.Path(path_type=Path),
        envvar="HOLDFAST_ETCD_CONFIG",
        help=f"Endpoints and certificate.  [default: {OPERATOR_CONFIG}; to read also {AGENT_CONFIG}]",
    )(function)


def with_client(config: Path | None, work: Callable[[Client], Awaitable[T]], *, writes: bool = False) -> T:
    """Run `work` with a connected client and return what it returns.

    Raises Missing without credentials, ConfigError for bad ones, KvstoreError for what etcd says.
    """
    return asyncio.run(_with_client(choose(config, writes), work))


async def _with_client(path: Path, work: Callable[[Client], Awaitable[T]]) -> T:
    from kvstore.client import Client
    from kvstore.config import EtcdConfig

    client = Client(EtcdConfig.load(path))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await work(client)
    except TimeoutError as error:
        peers = ", ".join(client.config.endpoints)
        raise Unreachable(f"etcd at {peers} did not do it within {TIMEOUT_S:g} s") from error
    finally:
        await client.close()


def choose(given: Path | None, writes: bool) -> Path:
    """Return the configuration to use; what is named must exist, else the first that does."""
    candidates = [given] if given else [OPERATOR_CONFIG] if writes else [OPERATOR_CONFIG, AGENT_CONFIG]
    for path in candidates:
        if path.is_file():
            return path
    tried = " nor ".join(map(str, candidates))
    raise Missing(
        f"no configuration of etcd: there is no {tried}",
        hint="name one with --etcd-config; writing needs the operator's certificate (`holdfast certs issue`)",
    )
