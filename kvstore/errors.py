# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with etcd, as types.

    KvstoreError
    ├── ConfigError          etcd.config can not be used (file, field and reason in the message)
    ├── Unavailable          no answer, no leader, no connection: try again later; `peer` says who
    ├── PermissionDenied     this user may not read or write `key` (or has no user at all)
    ├── Compacted            the history from `wanted` on is gone: list again
    ├── LeaseNotFound        the lease expired or was revoked: grant a new one, write own keys again
    ├── RequestRefused       etcd will never take this request (too large, malformed)
    │   └── NoSpace          etcd takes no write at all before a person made room
    ├── NodeConflict         a node's name or pool is another node's
    ├── InvalidKeyPart       a name that can not become part of a key
    └── RecordError          a record in etcd that is not used: `key` and `reason`

Errors of the wire are turned into these once, in `kvstore.transport`; nobody else looks at gRPC codes.
"""

from __future__ import annotations

from core.errors import HoldfastError, shorten

# Of a request that etcd's limit, or that of gRPC above it, keeps out.
_TOO_LARGE_TEXTS = ("request is too large", "message larger than max")
_TOO_LARGE = "etcd takes 1.5 MiB a request, or what its --max-request-bytes says: write less at once"


class KvstoreError(HoldfastError):
    """The root: anything etcd said or failed to say."""


class ConfigError(KvstoreError):
    """Raised when etcd.config, or a certificate it names, can not be used."""


class Unavailable(KvstoreError):
    """Raised when no endpoint answered in time, or the answer was that there is no quorum.

    A write that raised this may still have happened.
    """

    def __init__(self, what: str, peer: str, reason: str) -> None:
        super().__init__(f"{what}: etcd at {peer} is unavailable: {shorten(reason, 300)}")
        self.peer = peer
        self.reason = reason


class PermissionDenied(KvstoreError):
    """Raised when etcd refuses this user a key or range."""

    def __init__(self, what: str, key: str, peer: str, reason: str) -> None:
        super().__init__(
            f"{what}: etcd at {peer} denies {shorten(key)!r}: {reason}",
            hint="check the role of the user that the client certificate's common name says",
        )
        self.key = key
        self.peer = peer


class Compacted(KvstoreError):
    """Raised when etcd no longer has, or never had, the history that a watch or a page needs.

    `compact_revision` is the oldest revision that is left, or 0 when etcd's history is younger than
    `wanted` (it was wiped or restored from a backup).  `head` is the revision that etcd was at then, 0 when
    it did not say: what comes after it is in the history that there is now.
    """

    def __init__(
        self, prefix: str, wanted: int, compact_revision: int, detail: str = "", *, head: int = 0
    ) -> None:
        reason = detail or f"compacted up to {compact_revision}"
        super().__init__(f"{shorten(prefix)!r}: the history from revision {wanted} on is gone: {reason}")
        self.prefix = prefix
        self.wanted = wanted
        self.compact_revision = compact_revision
        self.head = head


class LeaseNotFound(KvstoreError):
    """Raised when a lease expired or was revoked."""

    def __init__(self, lease: int, what: str) -> None:
        super().__init__(f"{what}: etcd does not know the lease {lease:016x}")
        self.lease = lease


class RequestRefused(KvstoreError):
    """Raised when repeating the same request can not help."""

    def __init__(self, what: str, key: str, peer: str, reason: str) -> None:
        super().__init__(
            f"{what} {shorten(key)!r}: etcd at {peer} refuses: {shorten(reason, 300)}",
            hint=_TOO_LARGE if any(each in reason for each in _TOO_LARGE_TEXTS) else "",
        )
        self.key = key
        self.reason = reason


class NoSpace(RequestRefused):
    """Raised when etcd's database is full: compact, defragment, disarm the alarm."""


class NodeConflict(KvstoreError):
    """Raised when the name or the pool that a node wants is another node's; the text names that one."""


class InvalidKeyPart(KvstoreError):
    """Raised when a name, a prefix or a label text can not be made part of a key."""

    def __init__(self, part: str, value: object, reason: str) -> None:
        super().__init__(f"{part} {shorten(value)!r} can not be part of a key in etcd: {reason}")
        self.part = part


class RecordError(KvstoreError):
    """Raised by parsers for a record that must not be used; `reason` is one short phrase.

    `kind` is one word of a small fixed set, for the metric: garbage, mismatch, size, key.
    """

    def __init__(self, key: str, reason: str, *, kind: str = "garbage") -> None:
        super().__init__(f"record {shorten(key)!r} in etcd is ignored: {reason}")
        self.key = key
        self.reason = reason
        self.kind = kind
