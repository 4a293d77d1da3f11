# SPDX-License-Identifier: Apache-2.0
"""Which file lies where.

    DIR/ca/        ca.crt  ca.key                                    stays with who issues certificates
    DIR/etcd/      ca.crt  etcd.crt      etcd.key                    to the etcd member
    DIR/agent/     ca.crt  agent.crt     agent.key     etcd.config   to the host of that name
    DIR/operator/  ca.crt  operator.crt  operator.key  etcd.config   to people

Each folder but the first is complete: it is what is mounted or copied to where it is used.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

CERTIFICATE_MODE = 0o644
KEY_MODE = 0o600
FOLDER_MODE = 0o700
AUTHORITY_FILE = "ca.crt"
CONFIG_FILE = "etcd.config"


class Holder(enum.Enum):
    """Who holds a certificate; the value is its folder's and its files' name."""

    AUTHORITY = "ca"  # signs the others
    ETCD = "etcd"  # a member: server to clients, server and client to its peers
    AGENT = "agent"  # a client, one user name per host
    OPERATOR = "operator"  # a client: people and the API

    @property
    def has_config(self) -> bool:
        """True for those who talk to etcd and so need an etcd.config."""
        return self in (Holder.AGENT, Holder.OPERATOR)


@dataclass(frozen=True)
class Folder:
    """The files of one holder."""

    holder: Holder
    path: Path

    @property
    def certificate(self) -> Path:
        return self.path / f"{self.holder.value}.crt"

    @property
    def key(self) -> Path:
        return self.path / f"{self.holder.value}.key"

    @property
    def authority(self) -> Path:
        """The copy of the CA's certificate (for the CA itself: its certificate)."""
        return self.path / AUTHORITY_FILE

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE


@dataclass(frozen=True)
class Layout:
    """The folders below one directory."""

    root: Path

    def folder(self, holder: Holder, path: Path | None = None) -> Folder:
        """Return the folder of `holder`, or the same files at `path` (a fleet has many agents)."""
        return Folder(holder, path or self.root / holder.value)
