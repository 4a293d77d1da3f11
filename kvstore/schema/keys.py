# SPDX-License-Identifier: Apache-2.0
"""Keys: what lives where in etcd, who writes it, and the builders.

Keys under `cilium/` are Cilium's contract (1.11 to 1.19 read them the same); those under `holdfast/` are
ours and carry a version.  A builder raises InvalidKeyPart for a part that would change the key's
structure; a parser (in the module of its record) raises RecordError.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass

from kvstore.errors import InvalidKeyPart, RecordError

IDENTITY_IDS = "cilium/state/identities/v1/id/"
IDENTITY_VALUES = "cilium/state/identities/v1/value/"
IDENTITY_LOCKS = "cilium/state/identities/v1/locks/"
IPS = "cilium/state/ip/v1/"
NODES = "cilium/state/nodes/v1/"
HEARTBEAT = "cilium/.heartbeat"
POLICIES = "holdfast/policies/v1/"
EXTERNAL = "holdfast/external/v1/"
POOLS = "holdfast/pools/v1/"
ELECTIONS = "holdfast/election/v1/"
MAINTENANCE = "holdfast/maintenance/v1/"

DEFAULT_SPACE = "default"

# A name that is one part of a key: a host, a cluster, a policy, a machine.  253 is the limit of DNS names.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,251}[A-Za-z0-9])?")
# The longest label text of one identity; etcd itself takes 1.5 MiB, a sane label set has under 2 KiB.
MAX_LABELS = 16 * 1024


@dataclass(frozen=True)
class Prefix:
    """One prefix of the store: what it holds, who may write there, and whether keys hang on a lease."""

    prefix: str
    holds: str
    writers: tuple[str, ...]
    leased: bool


# Writers are roles: agent (each host), external (the injector), operator (a person's certificate or the
# elected agent's duties: garbage collection, heartbeat), etcd (a member's maintenance).  certs/ makes etcd's
# roles from this table.
PREFIXES: tuple[Prefix, ...] = (
    Prefix(IDENTITY_IDS, "labels of a numeric identity", ("agent", "external", "operator"), leased=False),
    Prefix(IDENTITY_VALUES, "users of an identity, by labels and node", ("agent", "external"), leased=True),
    Prefix(IDENTITY_LOCKS, "locks on labels while their identity is allocated", ("agent",), leased=True),
    Prefix(IPS, "identity of an address or prefix", ("agent", "external"), leased=True),
    Prefix(NODES, "hosts", ("agent",), leased=True),
    Prefix(HEARTBEAT, "time of the last sign of life", ("agent", "operator"), leased=False),
    Prefix(POLICIES, "policy documents", ("operator",), leased=False),
    Prefix(EXTERNAL, "machines without an agent", ("external", "operator"), leased=False),
    # With users in etcd the operator writes them together with the host's rights, and no agent may.
    Prefix(POOLS, "which node a pool of addresses belongs to", ("operator",), leased=False),
    Prefix(ELECTIONS, "candidates of elected roles", ("agent", "external", "etcd"), leased=True),
    Prefix(MAINTENANCE, "snapshots and state of each etcd member", ("etcd",), leased=False),
)
_SCOPES = tuple((entry.prefix, entry.prefix.rstrip("/")) for entry in PREFIXES)


def scope_of(key: str) -> str:
    """Return the known prefix that `key` lies in, or "other": a metric label of few values."""
    for prefix, scope in _SCOPES:
        if key.startswith(prefix):
            return scope
    return "other"


def identity_id_key(number: int) -> str:
    """Return the key that holds the labels of identity `number`."""
    if not 0 < number < 1 << 24:
        raise InvalidKeyPart("identity", number, "cluster identities are 1 to 16777215")
    return f"{IDENTITY_IDS}{number}"


def identity_value_prefix(labels: str) -> str:
    """Return the prefix of all users of the identity with these serialized labels."""
    return f"{IDENTITY_VALUES}{_labels(labels)}/"


def identity_value_key(labels: str, node: str) -> str:
    """Return the key by which `node` (its address) says that it uses these labels."""
    return f"{IDENTITY_VALUES}{_labels(labels)}/{_address('node address', node)}"


def identity_lock_prefix(labels: str) -> str:
    """Return the prefix of the locks that Cilium agents take while they allocate these labels."""
    return f"{IDENTITY_LOCKS}{_labels(labels)}/"


def identity_lock_key(labels: str, lease: int) -> str:
    """Return the key by which the holder of `lease` locks these labels, as etcd's own mutex names it."""
    return f"{identity_lock_prefix(labels)}{lease:x}"


def ip_space_prefix(space: str) -> str:
    """Return the prefix of all addresses of one address space."""
    return f"{IPS}{_name('address space', space)}/"


def ip_key(space: str, prefix: str) -> str:
    """Return the key of an address ("10.0.0.1") or of a prefix ("10.0.0.0/24")."""
    return ip_space_prefix(space) + canonical_prefix(prefix)


def node_cluster_prefix(cluster: str) -> str:
    return f"{NODES}{_name('cluster', cluster)}/"


def node_key(cluster: str, name: str) -> str:
    return node_cluster_prefix(cluster) + _name("node", name)


def pool_counter_key(cluster: str) -> str:
    """Return the key that changes with every claim of another size than the cluster's own."""
    return POOLS + _name("cluster", cluster)


def pool_cluster_prefix(cluster: str) -> str:
    return pool_counter_key(cluster) + "/"


def pool_key(cluster: str, prefix: str) -> str:
    """Return the key of the claim of a pool ("10.50.2.0/24")."""
    return pool_cluster_prefix(cluster) + canonical_prefix(prefix)


def heartbeat_key() -> str:
    return HEARTBEAT


def policy_key(name: str) -> str:
    """Return the key of a policy; its name may have a namespace in front: ``shop/allow``."""
    return POLICIES + "/".join(_name("policy", part) for part in name.split("/", 1))


def external_key(name: str) -> str:
    return EXTERNAL + _name("external resource", name)


def election_key(name: str) -> str:
    """Return the key that stands for an election; its candidates are below `election_prefix`."""
    return ELECTIONS + _name("election", name)


def election_prefix(name: str) -> str:
    return election_key(name) + "/"


def election_candidate_key(name: str, candidate: str) -> str:
    return election_prefix(name) + _name("candidate", candidate)


def maintenance_key(member: str) -> str:
    return MAINTENANCE + _name("etcd member", member)


def name_of(key: str, prefix: str, *, parts: int = 1) -> str:
    """Return the name that `key` has after `prefix`, of up to `parts` parts; RecordError if it is none."""
    name = key[len(prefix) :]
    words = name.split("/")
    if not key.startswith(prefix) or len(words) > parts or not all(map(_NAME.fullmatch, words)):
        raise RecordError(key, f"is not {prefix}<name>", kind="key")
    return name


def canonical_prefix(prefix: str) -> str:
    """Return an address or prefix in canonical text; InvalidKeyPart when it is neither, or has host bits."""
    try:
        if "/" in prefix:
            return str(ipaddress.ip_network(prefix))
        return str(ipaddress.ip_address(prefix))
    except ValueError as error:
        raise InvalidKeyPart("address", prefix, str(error)) from error


def _name(part: str, value: str) -> str:
    if not _NAME.fullmatch(value):
        raise InvalidKeyPart(part, value, "it must be 1 to 253 letters, digits or . _ : - inside")
    return value


# Nearly always this host's own address.
@functools.lru_cache(maxsize=64)
def _address(part: str, value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError as error:
        raise InvalidKeyPart(part, value, str(error)) from error


def _labels(labels: str) -> str:
    """Check the form `source:key=value;…;` only as far as the key's structure needs it."""
    if not labels.endswith(";"):
        raise InvalidKeyPart("labels", labels, "each label ends with ';'")
    if not labels.isprintable():
        raise InvalidKeyPart("labels", labels, "it holds control characters")
    if len(labels) > MAX_LABELS:
        raise InvalidKeyPart("labels", labels, f"it is longer than {MAX_LABELS} characters")
    return labels
