# SPDX-License-Identifier: Apache-2.0
"""etcd's members: how each of them is, and what can be done about it: compact, defragment, disarm.

A member counts as serving when a read that needs the quorum passes through it: one that is cut off, catches
up or is being defragmented answers `status` and not that.  Nothing here waits or repeats for long; the loop
above is `kvstore.maintenance`.

Called by: kvstore.maintenance, cli.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import grpc.aio
import msgspec

from kvstore import etcd_pb2 as pb
from kvstore import rpc
from kvstore.client import Client
from kvstore.errors import Compacted, KvstoreError, PermissionDenied
from kvstore.ops import encode_key
from kvstore.schema.keys import heartbeat_key
from kvstore.transport import Peer, translate

# Seconds for one question to one member.
ASK_S = 5.0
# Seconds until a compaction has freed what it compacted.
COMPACTION_S = 300.0


class Member(msgspec.Struct, frozen=True):
    """One member.  `error` says why it does not serve, empty when it does; sizes are bytes.

    `size` is the database file's; `used` is what of it holds something, the rest is free pages.
    """

    name: str
    id: int = 0
    endpoint: str = ""
    error: str = ""
    leader: bool = False
    version: str = ""
    revision: int = 0
    size: int = 0
    used: int = 0

    @property
    def free(self) -> int:
        return max(self.size - self.used, 0)


class Alarm(msgspec.Struct, frozen=True):
    """An alarm that a member raised: `kind` is NOSPACE or CORRUPT."""

    kind: str
    member: str
    id: int


class Cluster(msgspec.Struct, frozen=True):
    """What one look saw.  `error`: etcd did not say who its members are, so these are endpoints."""

    members: tuple[Member, ...]
    alarms: tuple[Alarm, ...] = ()
    error: str = ""

    def troubles(self) -> list[str]:
        """Return a sentence for the look as a whole and for each member that does not serve."""
        whole = [self.error] if self.error else []
        return whole + [f"{each.name}: {each.error}" for each in self.members if each.error]

    def member(self, name: str) -> Member | None:
        return next((each for each in self.members if each.name == name), None)


class Members:
    """See the module's text; uses the client's connections."""

    def __init__(self, client: Client, *, timeout: float = ASK_S) -> None:
        self._transport = client.transport
        self._timeout = timeout

    async def look(self) -> Cluster:
        """Ask every endpoint how it is, and etcd who its members are and which alarms stand."""
        asked = await asyncio.gather(*(self._ask(peer) for peer in self._transport.peers))
        try:
            listed = await self._transport.call(
                rpc.MEMBERS, pb.MemberListRequest(), "", timeout=self._timeout
            )
            alarms = await self._transport.call(rpc.ALARM, pb.AlarmRequest(), "", timeout=self._timeout)
        except KvstoreError as error:
            return Cluster(tuple(sorted(asked, key=lambda each: each.name)), error=str(error))
        members = tuple(sorted(_known(listed.members, asked), key=lambda each: each.name))
        names = {each.id: each.name for each in members}
        return Cluster(members, tuple(_alarm(each, names) for each in alarms.alarms))

    async def defragment(self, member: Member, timeout: float) -> None:
        """Have a member write its database anew, without free pages; it serves nobody meanwhile.

        After `timeout` seconds Unavailable is raised; the member goes on regardless, etcd can not stop it.
        """
        try:
            await self._transport.call_peer(
                self._peer(member), rpc.DEFRAGMENT, pb.DefragmentRequest(), timeout
            )
        except grpc.aio.AioRpcError as error:
            raise translate(error, f"defragment {member.name}", "", member.endpoint) from error

    async def compact(self, revision: int) -> None:
        """Forget all history before `revision`, and free what it took; nothing if that was done before."""
        request = pb.CompactionRequest(revision=revision, physical=True)
        try:
            await self._transport.call(rpc.COMPACT, request, "", timeout=COMPACTION_S, wanted=revision)
        except Compacted:
            return

    async def disarm(self, alarm: Alarm) -> None:
        """Take an alarm back; a member for which it is still true raises it again."""
        request = pb.AlarmRequest(action=pb.AlarmRequest.DEACTIVATE, memberID=alarm.id, alarm=alarm.kind)
        await self._transport.call(rpc.ALARM, request, "", timeout=self._timeout)

    # --- one member

    async def _ask(self, peer: Peer) -> Member:
        name = peer.target
        try:
            answer = await self._transport.call_peer(peer, rpc.STATUS, pb.StatusRequest(), self._timeout)
        except grpc.aio.AioRpcError as error:
            return Member(name, endpoint=name, error=str(translate(error, "status", "", name)))
        return Member(
            name,
            id=answer.header.member_id,
            endpoint=name,
            error="it is a learner" if answer.isLearner else await self._read(peer),
            leader=answer.leader == answer.header.member_id,
            version=answer.version,
            revision=answer.header.revision,
            size=answer.dbSize,
            used=answer.dbSizeInUse,
        )

    async def _read(self, peer: Peer) -> str:
        request = pb.RangeRequest(key=encode_key(heartbeat_key()), keys_only=True)
        try:
            await self._transport.call_peer(peer, rpc.RANGE, request, self._timeout)
        except grpc.aio.AioRpcError as error:
            typed = translate(error, "read", heartbeat_key(), peer.target)
            # Rights are looked at after the quorum was asked: this is an answer.
            return "" if isinstance(typed, PermissionDenied) else str(typed)
        return ""

    def _peer(self, member: Member) -> Peer:
        return next(peer for peer in self._transport.peers if peer.target == member.endpoint)


def _known(listed: Iterable[pb.Member], asked: Sequence[Member]) -> Iterable[Member]:
    """Yield every member that etcd has, with what the endpoint that leads to it said."""
    for each in listed:
        name = each.name or f"{each.ID:x}"
        answers = [found for found in asked if found.id == each.ID]
        silent = [found for found in asked if not found.id and _is_at(each, found.endpoint)]
        if answers:
            yield msgspec.structs.replace(answers[0], name=name)
        elif silent:
            yield msgspec.structs.replace(silent[0], name=name, id=each.ID)
        elif not each.name:
            yield Member(name, each.ID, error=f"it has never started (its peers know {each.peerURLs[0]})")
        else:
            yield Member(name, each.ID, error="no endpoint of etcd.config leads to it")


def _is_at(member: pb.Member, target: str) -> bool:
    return any(url.rpartition("//")[2].rstrip("/") == target for url in member.clientURLs)


def _alarm(wire: pb.AlarmMember, names: dict[int, str]) -> Alarm:
    kind = pb.AlarmType.Name(wire.alarm)
    return Alarm(kind, names.get(wire.memberID, f"{wire.memberID:x}"), wire.memberID)
