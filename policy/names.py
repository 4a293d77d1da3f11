# SPDX-License-Identifier: Apache-2.0
"""Named ports: which port an identity calls ``http``.

Containers have no field for it, so a label says it: ``holdfast.port.http=8080``, or ``53/UDP``.  Such labels
are part of the identity, hence every agent of the cluster knows the names of every peer, machines that were
registered by hand have them too, and a rule means the same at both ends of a flow.

Called by `policy.narrowing`, `policy.ports` and by the agent, which refuses containers with a bad one; pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from core.errors import shorten
from identity.errors import LabelError
from identity.labels import PORT_PREFIX, Label
from policy.model import MAX_PORT, SCTP, TCP, UDP, Transport

MAX_NAME: Final = 15
# A service name of IANA's: letters, digits and single hyphens inside; the first test is for one letter.
_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*\Z", re.ASCII)
_VALUE = re.compile(r"([1-9][0-9]{0,4})(?:/(TCP|UDP|SCTP))?\Z", re.ASCII | re.IGNORECASE)
_PROTOCOLS: Final = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}


def is_name(text: str) -> bool:
    """True if `text`, in lower case, can be the name of a port."""
    return len(text) <= MAX_NAME and _NAME.match(text) is not None


def port_key(name: str) -> str:
    """Return the key of the label that says which port `name` is."""
    return f"{PORT_PREFIX}{name}"


def port_of(value: str) -> Transport | None:
    """Return the port that a label's value says, ``8080`` (TCP) or ``53/UDP``; None if it says none."""
    found = _VALUE.match(value)
    if found is None or int(found[1]) > MAX_PORT:
        return None
    return Transport(int(found[1]), _PROTOCOLS[(found[2] or "TCP").upper()])


def check_port_labels(labels: Iterable[Label]) -> None:
    """Raise LabelError for a label that is meant to name a port and does not."""
    for each in labels:
        if not each.key.startswith(PORT_PREFIX):
            continue
        if not is_name(each.key.removeprefix(PORT_PREFIX)):
            raise LabelError(
                f"label {shorten(str(each))} does not name a port",
                hint=f"{PORT_PREFIX}NAME, at most {MAX_NAME} lower-case letters, digits and inner hyphens",
            )
        if port_of(each.value) is None:
            raise LabelError(
                f"{shorten(each.value)!r} of label {each.source}:{each.key} is no port",
                hint="a number from 1 to 65535, for TCP, or NUMBER/UDP, NUMBER/SCTP",
            )
