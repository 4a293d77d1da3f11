# SPDX-License-Identifier: Apache-2.0
"""In which order a policy map is changed, so that no packet meets a policy that nobody wrote.

A packet of identity i on transport t asks the map for (i, t), (any, t), (i, any), (any, any) and obeys the
first entry that is there; without one it is dropped.  The place of a key in that row is its rank, 0 to 3.
Packets ask while a map is changed entry by entry, by a batch too.  So

    first   everything is written by rank, 0 first    an exception stands before what it is excepted from
    then    everything is deleted by rank, 3 first    and goes after it

**Between any two writes every packet gets the verdict of A, the map before, or of B, the map after.**  What
both deny is denied at every moment, and what both allow passes.

Proof.  Look at the entry that decides for a packet, of rank r.  A packet asks for at most one key of each
rank, so the order within a rank does not matter.
  While writing, nothing of A is gone.  If the entry is B's, B has none for the packet below r: that would be
  written already, and decide.  So B decides with it.  If it is still A's, A has none below r: that would be
  there, as it was or as B has it, and decide.  So A decides with it.  If there is none, A has none either.
  While deleting, all of B is there.  If the entry is B's, B has none below r: B decides with it.  If it waits
  for its deletion, so does whatever A has below r that B lacks, and what B has is there: A has none below r
  and decides with it.  If there is none, B has none either.

That holds for any two maps, and for entries changed in place.  Whoever stops in the middle leaves a map
between A and B, and the next change, to C, starts from there: what A, B and C deny is denied all along.  So a
change of which an entry is refused ends there: nothing of a higher rank is written, nothing is deleted.

**Where A and B together do not fit into the map**, `make_room` says what is deleted before, as much as is
missing, and A is what is left of it:
  1. entries that allow and that B lacks, those of flows that B ends first.  Without an entry that allows, a
     map lets nobody in whom it did not let in before.
  2. after all of these, denials that B lacks and under which nothing of what stays allows anything;
  3. if that is too little, everything that allows, then every denial that B lacks.  The endpoint is closed
     until B is written: from a map in which nothing allows anything may be deleted.
A denied packet never passes then either; an allowed one may be dropped for the milliseconds of the change.

**A packet asks four times, not at one moment.**  One that asked for (i, t) before its denial was written may
ask for (any, t) after that was opened.  So programs that run have to end (`datapath.grace`) between an entry
and what contradicts it, or is deleted, at a higher rank: `Write.waits`.  Between two such pauses a program
that missed an entry finds at higher ranks what was there before, as A says, or the same verdict, as B says.

Pure.  Called by: `datapath.maps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

RawPolicyKey = tuple[int, int, int, int]  # PolicyKey, or any tuple of the same shape
RawPolicyEntry = tuple[bool, int, int]  # PolicyEntry, likewise
RawPolicyMap = Mapping[RawPolicyKey, RawPolicyEntry]

EXACT, PORT, IDENTITY, ALL = RANKS = range(4)
# The lowest rank at which programs that run may have missed an entry that allows (False) or denies (True).
_NOTHING_MISSED: Final = {False: len(RANKS), True: len(RANKS)}


class Write(NamedTuple):
    """Entries to write, then keys to delete, in this order; if `waits`, once running programs have ended."""

    upserts: list[tuple[RawPolicyKey, RawPolicyEntry]]
    deletes: list[RawPolicyKey]
    waits: bool = False


def rank(key: RawPolicyKey) -> int:
    """Return when a packet asks for this key."""
    identity, port, protocol, _ = key
    if port or protocol:
        return EXACT if identity else PORT
    return IDENTITY if identity else ALL


def in_order(
    upserts: Iterable[tuple[RawPolicyKey, RawPolicyEntry]], deletes: Iterable[RawPolicyKey]
) -> Iterator[Write]:
    """Yield the writes of a change for which there is room, one for a rank; no key may be in both."""
    written: tuple[list[tuple[RawPolicyKey, RawPolicyEntry]], ...] = ([], [], [], [])
    for item in upserts:
        written[rank(item[0])].append(item)
    deleted: tuple[list[RawPolicyKey], ...] = ([], [], [], [])
    for key in deletes:
        deleted[rank(key)].append(key)
    missed = dict(_NOTHING_MISSED)
    for each in RANKS:
        verdicts = {deny for _, (deny, *_) in written[each]}
        waits = any(missed[not deny] < each for deny in verdicts)
        if written[each]:
            yield Write(written[each], [], waits)
        missed = dict(_NOTHING_MISSED) if waits else missed
        for deny in verdicts:
            missed[deny] = min(missed[deny], each)
    for each in reversed(RANKS):
        if deleted[each]:
            waits = min(missed.values()) < each
            yield Write([], deleted[each], waits)
            missed = dict(_NOTHING_MISSED) if waits else missed


def replacing(present: RawPolicyMap, wanted: RawPolicyMap, size: int) -> Iterator[Write]:
    """Yield the writes that make a map of `size` entries hold `wanted` alone, which has to fit."""
    first = make_room(present, wanted, size)
    if first:
        yield Write([], first)
    left = {key: present[key] for key in present.keys() - first} if first else present
    new = [(key, entry) for key, entry in wanted.items() if left.get(key) != entry]
    yield from in_order(new, [key for key in left if key not in wanted])


def make_room(present: RawPolicyMap, wanted: RawPolicyMap, size: int) -> list[RawPolicyKey]:
    """Return what is deleted, in this order, before `wanted` is written: nothing if it fits beside `present`.

    `wanted` alone has to fit into `size` entries.
    """
    missing = len(present.keys() | wanted.keys()) - size
    if missing <= 0:
        return []
    allowing = [key for key, (deny, *_) in present.items() if not deny]
    denying = [key for key, (deny, *_) in present.items() if deny and key not in wanted]
    going = sorted((key for key in allowing if key not in wanted), key=_allowed_by(wanted))
    if len(going) < missing:
        allowed_by_the_rest = _allowed_by({key: present[key] for key in present.keys() & wanted.keys()})
        going += [key for key in denying if not allowed_by_the_rest(key)]
    return going[:missing] if len(going) >= missing else allowing + denying


def _allowed_by(state: RawPolicyMap) -> Callable[[RawPolicyKey], bool]:
    """Return what says of a key that is not in `state` whether this allows some packets that ask for it."""
    allowed = {(key[0], key[3]) for key, (deny, *_) in state.items() if not deny}
    directions = {direction for _, direction in allowed}

    def is_allowed(key: RawPolicyKey) -> bool:
        identity, _, _, direction = key
        if rank(key) == EXACT:
            found = next((state[each] for each in _asked(key) if each in state), None)
            return found is not None and not found[0]
        if not identity:
            return direction in directions
        return (identity, direction) in allowed or (0, direction) in allowed

    return is_allowed


def _asked(key: RawPolicyKey) -> Iterator[RawPolicyKey]:
    """Yield what a packet asks for whose first question is `key`."""
    identity, port, protocol, direction = key
    yield key
    yield 0, port, protocol, direction
    yield identity, 0, 0, direction
    yield 0, 0, 0, direction
