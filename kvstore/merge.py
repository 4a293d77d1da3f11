# SPDX-License-Identifier: Apache-2.0
"""Where a watched view stands in etcd's history, and what a batch of events changes in it.  Pure.

    snapshot at revision R ──▶ listed
    batches from R + 1 on ──▶ changes, one a key ──▶ passed
    stream lost ──▶ nothing: the cursor still says where to resume
    history lost ──▶ lost: the next step is a list

A revision is only a number: a store that was restored from a snapshot, and written since, has it again.  So
the cursor keeps a *witness*, the last write that it has passed: as of the view's revision that key was
written last just then, in this history and hardly in another.

Used by: kvstore.watcher.
"""

from __future__ import annotations

from kvstore.watch import Change, WatchBatch, Witness


class Cursor:
    """A position in etcd's history.  Owner: the one task that follows.

    `caught_up` is true once everything that had happened before the stream began has been delivered.
    """

    def __init__(self, revision: int = 0, cluster_id: int = 0, witness: Witness | None = None) -> None:
        self.revision = revision
        self.cluster_id = cluster_id
        self.witness = witness
        self.caught_up = False
        self._target = 0

    @property
    def must_list(self) -> bool:
        return self.revision <= 0

    def listed(self, revision: int, cluster_id: int = 0, witness: Witness | None = None) -> None:
        """A full list as of `revision` has been delivered, in which `witness` was written last."""
        self.revision = revision
        self.cluster_id = cluster_id
        self.witness = witness
        self.caught_up = True

    def resumed(self) -> None:
        """A new stream starts from here: what happened meanwhile is yet to come."""
        self.caught_up = False

    def lost(self) -> None:
        """The history after `revision` is gone: what happened meanwhile only a list can tell."""
        self.revision = 0
        self.cluster_id = 0
        self.witness = None
        self.caught_up = False

    def changes(self, batch: WatchBatch) -> list[Change]:
        """Return what a batch changes: one change a key, the last one.

        What was delivered before (a stream that was resumed repeats some) is dropped.
        """
        fresh = batch.changes
        if fresh and self.revision >= fresh[0].revision:
            fresh = [each for each in fresh if self.revision < each.revision]
        if len({each.key for each in fresh}) == len(fresh):
            return fresh
        last = {each.key: each for each in fresh}
        return [each for each in fresh if last[each.key] is each]

    def passed(self, batch: WatchBatch) -> None:
        """What the batch changes has been delivered."""
        self.witness = self._witness_after(batch)
        self.revision = max(self.revision, batch.revision)
        self._settle(batch)

    def _witness_after(self, batch: WatchBatch) -> Witness | None:
        """Return the last write that stands after a batch; none where it was deleted since."""
        key, revision = (self.witness.key, self.witness.revision) if self.witness else ("", 0)
        for each in batch.changes:
            if each.revision <= self.revision:
                continue
            if each.value is not None:
                key, revision = each.key, each.revision
            elif each.key == key:
                revision = 0
        return Witness(key, revision) if revision else None

    def _settle(self, batch: WatchBatch) -> None:
        """Decide whether the view has caught up: the revision etcd was at when the stream began has been
        passed, or after some quiet etcd had nothing more to say."""
        if batch.created:
            self._target = batch.head
        quiet = not batch.changes and not batch.created
        if quiet or self.revision >= self._target:
            self.caught_up = True
