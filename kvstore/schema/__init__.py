# SPDX-License-Identifier: Apache-2.0
"""Every key and record in etcd, built and parsed in one place, byte for byte as Cilium 1.11 has them.

    keys      what lives where, who may write it; builders and parsers of keys
    codec     JSON as Go writes it; tolerant reading; rewriting that keeps unknown fields
    identity  numeric identities: id/<number>, value/<labels>/<node>, locks/<labels>/
    ip        which identity an address or prefix has
    node      hosts
    external  VMs and machines without an agent, policies, the heartbeat: what Holdfast adds

Pure.  Called by: everybody who reads or writes keys; nobody else puts keys together (a test looks).
"""

from kvstore.errors import InvalidKeyPart, RecordError
from kvstore.schema.external import (
    ExternalRecord,
    encode_external,
    encode_heartbeat,
    encode_policy,
    parse_external,
    parse_heartbeat,
    parse_policy,
)
from kvstore.schema.identity import (
    encode_identity_id,
    encode_identity_value,
    parse_identity_id,
    parse_identity_id_key,
    parse_identity_value,
    parse_identity_value_key,
)
from kvstore.schema.ip import IpRecord, NamedPort, encode_ip, ip_record, parse_ip, parse_ip_key, rewrite_ip
from kvstore.schema.keys import (
    DEFAULT_SPACE,
    ELECTIONS,
    EXTERNAL,
    HEARTBEAT,
    IDENTITY_IDS,
    IDENTITY_LOCKS,
    IDENTITY_VALUES,
    IPS,
    NODES,
    POLICIES,
    PREFIXES,
    Prefix,
    election_candidate_key,
    election_key,
    election_prefix,
    external_key,
    heartbeat_key,
    identity_id_key,
    identity_lock_key,
    identity_lock_prefix,
    identity_value_key,
    identity_value_prefix,
    ip_key,
    ip_space_prefix,
    name_of,
    node_cluster_prefix,
    node_key,
    policy_key,
    scope_of,
)
from kvstore.schema.node import (
    AllocCidr,
    NodeAddress,
    NodeRecord,
    encode_node,
    parse_node,
    parse_node_key,
    rewrite_node,
)

__all__ = [
    "DEFAULT_SPACE",
    "ELECTIONS",
    "EXTERNAL",
    "HEARTBEAT",
    "IDENTITY_IDS",
    "IDENTITY_LOCKS",
    "IDENTITY_VALUES",
    "IPS",
    "NODES",
    "POLICIES",
    "PREFIXES",
    "AllocCidr",
    "ExternalRecord",
    "InvalidKeyPart",
    "IpRecord",
    "NamedPort",
    "NodeAddress",
    "NodeRecord",
    "Prefix",
    "RecordError",
    "election_candidate_key",
    "election_key",
    "election_prefix",
    "encode_external",
    "encode_heartbeat",
    "encode_identity_id",
    "encode_identity_value",
    "encode_ip",
    "encode_node",
    "encode_policy",
    "external_key",
    "heartbeat_key",
    "identity_id_key",
    "identity_lock_key",
    "identity_lock_prefix",
    "identity_value_key",
    "identity_value_prefix",
    "ip_key",
    "ip_record",
    "ip_space_prefix",
    "name_of",
    "node_cluster_prefix",
    "node_key",
    "parse_external",
    "parse_heartbeat",
    "parse_identity_id",
    "parse_identity_id_key",
    "parse_identity_value",
    "parse_identity_value_key",
    "parse_ip",
    "parse_ip_key",
    "parse_node",
    "parse_node_key",
    "parse_policy",
    "policy_key",
    "rewrite_ip",
    "rewrite_node",
    "scope_of",
]
