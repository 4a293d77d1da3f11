# SPDX-License-Identifier: Apache-2.0
"""The methods of etcd's API that are used: path, messages, and how each may be treated.

`kvstore/etcd_pb2.py` and `.pyi` are generated from `kvstore/etcd.proto` and checked in.  To make them
again, from the repository's root (the only use of grpcio-tools; a unit test compares)::

    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. kvstore/etcd.proto

Used by: kvstore.transport and the modules above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from kvstore import etcd_pb2 as pb

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True)
class Method(Generic[Request, Response]):
    """`kind` and `action` are the metric's labels.  `repeatable`: sending it twice does no harm."""

    path: str
    request: type[Request]
    response: type[Response]
    kind: str
    action: str
    repeatable: bool = False


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse, "read", "range", True)
PUT = Method("/etcdserverpb.KV/Put", pb.PutRequest, pb.PutResponse, "write", "put")
DELETE = Method(
    "/etcdserverpb.KV/DeleteRange", pb.DeleteRangeRequest, pb.DeleteRangeResponse, "write", "delete"
)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse, "write", "txn")
LEASE_GRANT = Method(
    "/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse, "lease", "grant"
)
LEASE_REVOKE = Method(
    "/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse, "lease", "revoke"
)
LEASE_TTL = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive",
    pb.LeaseTimeToLiveRequest,
    pb.LeaseTimeToLiveResponse,
    "lease",
    "ttl",
    True,
)
STATUS = Method("/etcdserverpb.Maintenance/Status", pb.StatusRequest, pb.StatusResponse, "read", "status")

# What concerns the members and not the keys; used by kvstore.members.
MEMBERS = Method(
    "/etcdserverpb.Cluster/MemberList", pb.MemberListRequest, pb.MemberListResponse, "read", "members", True
)
ALARM = Method("/etcdserverpb.Maintenance/Alarm", pb.AlarmRequest, pb.AlarmResponse, "write", "alarm")
COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionRequest, pb.CompactionResponse, "write", "compact")
DEFRAGMENT = Method(
    "/etcdserverpb.Maintenance/Defragment",
    pb.DefragmentRequest,
    pb.DefragmentResponse,
    "write",
    "defragment",
)

WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse, "watch", "watch")
KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive",
    pb.LeaseKeepAliveRequest,
    pb.LeaseKeepAliveResponse,
    "lease",
    "keepalive",
)
