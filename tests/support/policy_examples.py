# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/policy.md, with what their comment lines say about packets.

A YAML block is an example.  Its comment lines are ``# endpoint LABELS`` and, for the endpoint above them,
``# allowed|dropped|denied ingress|egress PEER PORT/PROTOCOL``; PEER is labels joined by ``;`` or a prefix,
and for ICMP the type stands in the place of the port.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from identity.labels import Labels
from identity.local import prefix_labels
from policy.model import ICMP, SCTP, TCP, UDP, Direction, Transport
from tests.support.policy_reference import Verdict

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "policy.md"
_BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VERDICTS = {"allowed": Verdict.ALLOWED, "dropped": Verdict.NO_RULE, "denied": Verdict.DENIED}
_PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP, "ICMP": ICMP}


@dataclass(frozen=True)
class Packet:
    """One packet of an example and what must become of it."""

    endpoint: Labels
    direction: Direction
    peer: Labels
    transport: Transport
    verdict: Verdict


@dataclass(frozen=True)
class Example:
    """One example: its text, comments included, and its packets."""

    text: str
    packets: list[Packet] = field(default_factory=list)


def examples() -> list[Example]:
    """Return the examples in the order of the page."""
    return [_example(text) for text in _BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))]


def _example(text: str) -> Example:
    example = Example(text)
    endpoint = Labels()
    for line in re.findall(r"^# (.*)$", text, re.MULTILINE):
        words = line.split()
        if words[0] == "endpoint":
            endpoint = _labels(words[1])
            continue
        verdict, direction, peer, transport = words
        example.packets.append(
            Packet(
                endpoint,
                Direction[direction.upper()],
                _labels(peer),
                _transport(transport),
                _VERDICTS[verdict],
            )
        )
    return example


def _labels(text: str) -> Labels:
    return prefix_labels(text) if text[0].isdigit() else Labels.of(text.split(";"))


def _transport(text: str) -> Transport:
    number, _, protocol = text.partition("/")
    return Transport(int(number), _PROTOCOLS[protocol])
