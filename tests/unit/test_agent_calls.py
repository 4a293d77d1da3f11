# SPDX-License-Identifier: Apache-2.0
"""Bodies of driver calls, and records of etcd on their way into the tables: what is refused, and how."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import calls
from agent.errors import DriverError
from agent.ipcache import KVSTORE_SOURCE, Record, new_table
from agent.sinks import IpSink

NETWORK, ENDPOINT = "a" * 64, "b" * 64
IDS = {"NetworkID": NETWORK, "EndpointID": ENDPOINT}


def decode(kind: type[calls.T], **fields: object) -> calls.T:
    return calls.decode("Method", json.dumps(fields).encode(), kind)


def test_call_as_the_engine_sends_it() -> None:
    """Fields that nobody reads are ignored, and nil lists and objects are null."""
    call = decode(calls.CreateEndpoint, **IDS, Interface={"Address": "", "MacAddress": ""}, Options=None)
    assert (call.network_id, call.endpoint_id, call.interface) == (NETWORK, ENDPOINT, calls.Interface())
    assert decode(calls.CreateEndpoint, **IDS, Interface=None).interface is None
    assert decode(calls.CreateNetwork, NetworkID=NETWORK, IPv4Data=None).pools is None
    assert decode(calls.ProgramExternal, **IDS).options is None
    assert calls.decode("Plugin.Activate", b"", calls.Call) == calls.Call()


@pytest.mark.parametrize("value", ["", "../../etc/x", "a/b", "x" * 129, 7, None, "\x00"])
def test_identifier_that_could_be_a_path_is_refused(value: object) -> None:
    with pytest.raises(DriverError, match="NetworkID"):
        decode(calls.NetworkCall, NetworkID=value)


@pytest.mark.parametrize("mac", ["x", "02:42:ac:11:00", "02:42:ac:11:00:02:03", 5])
def test_mac_that_is_none_is_refused(mac: object) -> None:
    with pytest.raises(DriverError, match="MacAddress"):
        decode(calls.CreateEndpoint, **IDS, Interface={"MacAddress": mac})


@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_a_driver_error(body: bytes) -> None:
    with contextlib.suppress(DriverError):
        calls.decode("Method", body, calls.CreateEndpoint)


# --- records


def put(sink: IpSink, address: str, number: int, *, space: str = "default") -> str:
    key = f"cilium/state/ip/v1/{space}/{address}"
    sink.put(key, json.dumps({"IP": address, "ID": number}).encode())
    return key


@pytest.mark.parametrize("number", [0, 1 << 24, 1 << 24 | 5, (1 << 32) - 1])
def test_number_that_only_one_host_knows_is_none_for_etcd(number: int) -> None:
    sink = IpSink(new_table().source(KVSTORE_SOURCE), 60.0)
    key = put(sink, "10.0.0.1", number)
    assert str(number) in sink.ignored[key]
    assert not sink.source.entries()
    sink.deleted(key)
    assert not sink.ignored


def test_what_etcd_may_say_of_an_address() -> None:
    sink = IpSink(new_table().source(KVSTORE_SOURCE), 60.0)
    for number, meant in ((1, 6), (2, 2), (256, 256), (131_500, 131_500)):
        put(sink, "10.0.0.1", number)
        assert sink.source.entries()["10.0.0.1/32"] == Record(meant, space="default")


def test_complaint_ends_with_its_key_whatever_the_key_is() -> None:
    sink = IpSink(new_table().source(KVSTORE_SOURCE), 60.0)
    good, bad = put(sink, "10.0.0.1", 300), "cilium/state/ip/v1/foreign"
    sink.put(bad, b"x")
    other = put(sink, "10.0.0.1", 0, space="other")
    assert set(sink.ignored) == {bad, other}
    sink.deleted(bad)
    sink.deleted(other)
    assert not sink.ignored
    assert sink.source.entries()["10.0.0.1/32"].space == "default", good
