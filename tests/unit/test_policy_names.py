# SPDX-License-Identifier: Apache-2.0
"""Labels that name ports: what they say, and what becomes of a container whose label says nothing."""

from __future__ import annotations

import pytest

from agent.errors import EndpointRefused
from agent.labels import container_labels
from identity.filter import LabelFilter
from policy.model import SCTP, TCP, UDP, Transport
from policy.names import is_name, port_of


def test_values() -> None:
    assert port_of("8080") == port_of("8080/tcp") == Transport(8080, TCP)
    assert port_of("53/UDP") == Transport(53, UDP)
    assert port_of("65535/Sctp") == Transport(65535, SCTP)
    for bad in ("", "0", "65536", "080", "80/", "/TCP", "80/ANY", "80-90", " 80", "80\n", "8e1", "٨٠"):
        assert port_of(bad) is None, bad


def test_names() -> None:
    for good in ("http", "a", "http-2", "9p", "x" * 15):
        assert is_name(good), good
    for bad in ("", "80", "HTTP", "-a", "a-", "a--b", "a_b", "a.b", "ä", "a\n", "x" * 16):
        assert not is_name(bad), bad


def test_port_labels_of_a_container_are_part_of_its_identity() -> None:
    given = {"app": "web", "holdfast.port.http": "8080", "holdfast.port.dns": "53/udp"}
    _, identity = container_labels(LabelFilter(), "web-1", given, "net")
    assert identity.serialized == (
        "container:app=web;container:holdfast.network=net;"
        "container:holdfast.port.dns=53/udp;container:holdfast.port.http=8080;"
    )


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("holdfast.port.http", "eighty", "'eighty' of label container:holdfast.port.http is no port"),
        ("holdfast.port.http", "", "'' of label container:holdfast.port.http is no port"),
        ("holdfast.port.HTTP", "80", "does not name a port"),
        ("holdfast.port.a_b", "80", "does not name a port"),
    ],
)
def test_container_with_a_bad_one_is_refused(key: str, value: str, problem: str) -> None:
    """Left out, a rule that denies the name would miss the container."""
    with pytest.raises(EndpointRefused, match="container web-1 has a label") as caught:
        container_labels(LabelFilter(), "web-1", {"app": "web", key: value}, "net")
    assert problem in str(caught.value)
