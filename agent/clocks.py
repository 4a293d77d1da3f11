# SPDX-License-Identifier: Apache-2.0
"""Whose clock is wrong: this host's own, or another's?  Pure; `agent.health` hands in what probes found.

A probe's answer says what time it is there, to a second.  A clock is wrong that differs from the middle of
all of them, this host's included, by more than `TOLERATED_S`: the host with the wrong clock says so of
itself, and the others name it.  Of two clocks nobody can tell: each names the other.

Wrong clocks end certificates early or late and make logs of two hosts impossible to compare; enforcement does
not look at them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Far more than a clock that anything keeps, and than a date in seconds and a slow answer can be wrong by.
TOLERATED_S = 10.0


@dataclass(frozen=True)
class Verdict:
    """What the clocks say.  Seconds ahead of most; negative: behind."""

    ahead: float = 0.0  # of this host's own, 0 when it is right
    differing: int = 0  # other nodes whose clocks differ from this one's
    others: int = 0  # whose clocks are known
    wrong: dict[str, float] = field(default_factory=dict)  # node → seconds


class Clocks:
    """Node → seconds that its clock is ahead of this host's; those that differ are known without a search."""

    def __init__(self) -> None:
        self.known: dict[str, float] = {}
        self._differing: dict[str, float] = {}

    def put(self, node: str, ahead: float | None) -> None:
        """Take what the last probe found; None: it said nothing."""
        self.forget(node)
        if ahead is not None:
            self.known[node] = ahead
            if abs(ahead) > TOLERATED_S:
                self._differing[node] = ahead

    def forget(self, node: str) -> None:
        self.known.pop(node, None)
        self._differing.pop(node, None)

    def verdict(self) -> Verdict:
        """Compare all clocks.  Safe in a thread: it looks at copies."""
        differing, others = dict(self._differing), len(self.known)
        if 2 * len(differing) <= others:  # with this one, most agree
            return Verdict(0.0, len(differing), others, differing)
        known = dict(self.known)
        most = middle([0.0, *known.values()])
        wrong = {node: ahead - most for node, ahead in known.items() if abs(ahead - most) > TOLERATED_S}
        return Verdict(-most if abs(most) > TOLERATED_S else 0.0, len(differing), others, wrong)


def middle(values: list[float]) -> float:
    """Return the median; of an even number the one of both that is nearer to 0, which is this host's."""
    ordered = sorted(values)
    return min(ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2], key=abs)
