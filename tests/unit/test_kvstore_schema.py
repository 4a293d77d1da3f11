# SPDX-License-Identifier: Apache-2.0
"""Keys and records against what a real cilium-agent wrote, and against garbage."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore import schema
from kvstore.errors import InvalidKeyPart, RecordError
from kvstore.schema.ip import mask_length

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests" / "data" / "etcd"


def dump(name: str) -> dict[str, str]:
    """Return the keys and values of a recorded dump."""
    lines = (DATA / name).read_text().splitlines()
    pairs = zip(lines[::3], lines[1::3], strict=False)
    return {key.removeprefix("KEY   "): value.removeprefix("VALUE ") for key, value in pairs}


ALL = {
    **dump("three-endpoints.txt"),
    **dump("with-external-vm.txt"),
    **dump("cluster-name-and-id.txt"),
}


def under(prefix: str) -> list[tuple[str, str]]:
    found = [(key, value) for key, value in ALL.items() if key.startswith(prefix)]
    assert found
    return found


# --- byte for byte


@pytest.mark.parametrize(("key", "value"), under(schema.IPS))
def test_ip_record_is_written_as_it_was_read(key: str, value: str) -> None:
    record = schema.parse_ip(key, value.encode())
    space, prefix = schema.parse_ip_key(key)
    assert schema.ip_key(space, prefix) == key
    if value != '{"IP":"10.77.0.6","ID":4242}':  # by hand: accepted, but not how an agent writes
        assert schema.encode_ip(record).decode() == value
        built = schema.ip_record(
            prefix, record.identity, host_ip=record.host_ip, metadata=record.metadata, key=record.key
        )
        if not record.named_ports:
            assert schema.encode_ip(built).decode() == value


@pytest.mark.parametrize(("key", "value"), under(schema.NODES))
def test_node_record_is_written_as_it_was_read(key: str, value: str) -> None:
    record = schema.parse_node(key, value.encode())
    assert schema.encode_node(record).decode() == value
    assert schema.node_key(*schema.parse_node_key(key)) == key
    assert record.ipv4_alloc_cidr is not None
    assert schema.AllocCidr.of(record.ipv4_alloc_cidr.prefix) == record.ipv4_alloc_cidr


@pytest.mark.parametrize(("key", "value"), under(schema.IDENTITY_IDS))
def test_identity_is_written_as_it_was_read(key: str, value: str) -> None:
    number, labels = schema.parse_identity_id(key, value.encode())
    assert schema.identity_id_key(number) == key
    assert schema.encode_identity_id(labels).decode() == value


@pytest.mark.parametrize(("key", "value"), under(schema.IDENTITY_VALUES))
def test_identity_user_is_written_as_it_was_read(key: str, value: str) -> None:
    labels, node, number = schema.parse_identity_value(key, value.encode())
    assert schema.identity_value_key(labels, node) == key
    assert key.startswith(schema.identity_value_prefix(labels))
    assert schema.encode_identity_value(number).decode() == value


def test_heartbeat_is_written_as_it_was_read() -> None:
    value = ALL[schema.heartbeat_key()]
    at = schema.parse_heartbeat(value.encode())
    assert at == datetime(2026, 11, 20, 10, 21, 54, tzinfo=UTC)
    assert schema.encode_heartbeat(at).decode() == value
    abroad = at.astimezone(timezone(timedelta(hours=2)))
    assert schema.parse_heartbeat(abroad.isoformat().encode()) == at
    assert schema.encode_heartbeat(abroad).decode() == value


def test_fields_of_a_workload_in_another_cluster() -> None:
    key = "cilium/state/ip/v1/cluster2/10.79.0.7"
    record = schema.parse_ip(key, ALL[key].encode())
    assert record.identity == 131500
    assert record.namespace == "default"
    assert record.named_ports == (schema.NamedPort("http", 8080, "TCP"),)


def test_labels_may_hold_slashes_and_the_last_one_ends_them() -> None:
    labels = "container:app=b;/x=y;"
    key = schema.identity_value_key(labels, "10.0.0.1")
    assert schema.parse_identity_value_key(key) == (labels, "10.0.0.1")


def test_go_escapes_html_in_json() -> None:
    record = schema.ip_record("10.0.0.1", 300, metadata="<a&b>\u2028")
    text = schema.encode_ip(record).decode()
    assert '"Metadata":"\\u003ca\\u0026b\\u003e\\u2028"' in text
    assert schema.parse_ip(schema.ip_key("default", "10.0.0.1"), text.encode()) == record


# --- tolerant when read


def test_null_counts_as_missing_and_unknown_fields_are_skipped() -> None:
    value = b'{"IP":"10.0.0.1","HostIP":null,"ID":5,"Metadata":null,"NamedPorts":null,"New":[1,{"a":2}]}'
    record = schema.parse_ip("cilium/state/ip/v1/default/10.0.0.1", value)
    assert (record.host_ip, record.metadata, record.identity) == ("", "", 5)


def test_ipv6_and_prefixes() -> None:
    for prefix in ("fd00::1", "fd00::/64", "10.0.0.0/8", "0.0.0.0/0", "10.1.2.3/32"):
        key = schema.ip_key("default", prefix)
        record = schema.parse_ip(key, schema.encode_ip(schema.ip_record(prefix, 7)))
        assert record.prefix == prefix
        assert record.is_host == ("/" not in prefix)


@given(bits=st.integers(0, 32))
def test_mask_length_inverts_the_mask(bits: int) -> None:
    mask = ((0xFFFFFFFF << (32 - bits)) & 0xFFFFFFFF).to_bytes(4, "big")
    assert mask_length(mask) == bits


# --- unknown fields survive


def test_rewriting_keeps_what_a_newer_writer_put_in() -> None:
    old = b'{"Name":"n","Cluster":"c","BootID":"abc<","Annotations":{"z":1},"ClusterID":4}'
    record = schema.parse_node("cilium/state/nodes/v1/c/n", old)
    text = schema.rewrite_node(record, old)
    assert text.endswith(b',"BootID":"abc\\u003c","Annotations":{"z":1}}')
    assert schema.parse_node("cilium/state/nodes/v1/c/n", text) == record
    ip = schema.ip_record("10.0.0.1", 4)
    assert json.loads(schema.rewrite_ip(ip, b'{"IP":"10.0.0.1","X":[null]}'))["X"] == [None]
    assert schema.rewrite_ip(ip, b"garbage") == schema.encode_ip(ip)


def test_external_record_round_trip_keeps_unknown_fields() -> None:
    record = schema.ExternalRecord("vm-1", ("10.1.2.3",), ("container:app=legacy",), host_ip="192.0.2.1")
    key = schema.external_key("vm-1")
    assert schema.parse_external(key, schema.encode_external(record)) == record
    again = schema.encode_external(record, b'{"name":"vm-1","later":true}')
    assert json.loads(again)["later"] is True


def test_policy_is_its_document() -> None:
    key = schema.policy_key("allow-legacy")
    assert schema.parse_policy(key, schema.encode_policy("a: ü")) == ("allow-legacy", "a: ü")


# --- bad records


IP_KEY = "cilium/state/ip/v1/default/10.0.0.1"
NODE_KEY = "cilium/state/nodes/v1/default/n1"
ID_KEY = "cilium/state/identities/v1/id/300"
VALUE_KEY = "cilium/state/identities/v1/value/container:app=a;/10.0.0.9"

BAD: list[tuple[Callable[[str, bytes], object], str, bytes, str]] = [
    (schema.parse_ip, IP_KEY, b"", "garbage"),
    (schema.parse_ip, IP_KEY, b"\xff\xfe{}", "garbage"),
    (schema.parse_ip, IP_KEY, b"[]", "garbage"),
    (schema.parse_ip, IP_KEY, b"null", "garbage"),
    (schema.parse_ip, IP_KEY, b"[" * 100_000, "size"),
    (schema.parse_ip, IP_KEY, b"[" * 50_000, "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","ID":"5"}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","ID":-1}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","ID":4294967296}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","ID":true}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","Key":256}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.2","ID":5}', "mismatch"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","Mask":"/////w==","ID":5}', "mismatch"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","Mask":"AAD//w==","ID":5}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"nonsense","ID":5}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"10.0.0.1","HostIP":"host","ID":5}', "garbage"),
    (schema.parse_ip, IP_KEY, b'{"IP":"' + b"1" * 1_000_000 + b'"}', "size"),
    (
        schema.parse_ip,
        "cilium/state/ip/v1/default/10.0.0.1/24",
        b'{"IP":"10.0.0.1","Mask":"////AA=="}',
        "garbage",
    ),
    (schema.parse_ip, "cilium/state/ip/v1/10.0.0.1", b'{"IP":"10.0.0.1"}', "key"),
    (schema.parse_ip, "other/key", b'{"IP":"10.0.0.1"}', "key"),
    (schema.parse_node, NODE_KEY, b'{"Name":"n2","Cluster":"default"}', "mismatch"),
    (schema.parse_node, NODE_KEY, b'{"Name":"n1","Cluster":"other"}', "mismatch"),
    (schema.parse_node, NODE_KEY, b'{"Name":"n1"}', "garbage"),
    (schema.parse_node, f"{schema.NODES}default/n\n1", b'{"Name":"n\\n1","Cluster":"default"}', "key"),
    (schema.parse_node, f"{schema.NODES}d\x1b[1m/n1", b'{"Name":"n1","Cluster":"d\\u001b[1m"}', "key"),
    (schema.parse_node, NODE_KEY, b'{"Name":"n1","Cluster":"default","IPAddresses":"x"}', "garbage"),
    (
        schema.parse_node,
        NODE_KEY,
        b'{"Name":"n1","Cluster":"default","IPAddresses":[{"Type":"InternalIP","IP":"x"}]}',
        "garbage",
    ),
    (
        schema.parse_node,
        NODE_KEY,
        b'{"Name":"n1","Cluster":"default","IPv4AllocCIDR":{"IP":"10.0.0.0","Mask":"!!"}}',
        "garbage",
    ),
    (schema.parse_node, NODE_KEY + "/more", b"{}", "key"),
    (schema.parse_identity_id, ID_KEY, b"no end", "garbage"),
    (schema.parse_identity_id, ID_KEY, b"a=\n;", "garbage"),
    (schema.parse_identity_id, ID_KEY, b"\xff;", "garbage"),
    (schema.parse_identity_id, ID_KEY, b"x" * 70_000 + b";", "size"),
    (schema.parse_identity_id, ID_KEY.replace("300", "0300"), b"a:b=c;", "garbage"),
    (schema.parse_identity_id, ID_KEY.replace("300", "٣"), b"a:b=c;", "garbage"),
    (schema.parse_identity_id, ID_KEY.replace("300", "99999999"), b"a:b=c;", "garbage"),
    (schema.parse_identity_id, ID_KEY.replace("300", ""), b"a:b=c;", "garbage"),
    (schema.parse_identity_value, VALUE_KEY, b"0", "garbage"),
    (schema.parse_identity_value, VALUE_KEY, b"12 ", "garbage"),
    (schema.parse_identity_value, "cilium/state/identities/v1/value/x", b"12", "key"),
    (schema.parse_external, "holdfast/external/v1/a", b'{"name":"b","addresses":[],"labels":[]}', "mismatch"),
    (
        schema.parse_external,
        "holdfast/external/v1/a",
        b'{"name":"a","addresses":["x"],"labels":[]}',
        "garbage",
    ),
    (schema.parse_maintenance, f"{schema.MAINTENANCE}a", b'{"member":"a","seen":"today"}', "garbage"),
    (
        schema.parse_maintenance,
        f"{schema.MAINTENANCE}a",
        b'{"member":"b","seen":"2026-11-20T10:21:54Z"}',
        "mismatch",
    ),
    (schema.parse_policy, "holdfast/policies/v1/a/b/c", b"x", "key"),
    (schema.parse_policy, "holdfast/policies/v1/a", b"x" * 1_500_001, "size"),
]


@pytest.mark.parametrize(("parse", "key", "value", "kind"), BAD)
def test_bad_record_names_key_and_reason(
    parse: Callable[[str, bytes], object], key: str, value: bytes, kind: str
) -> None:
    with pytest.raises(RecordError) as caught:
        parse(key, value)
    assert caught.value.kind == kind
    assert caught.value.key == key
    assert caught.value.reason
    assert len(str(caught.value)) < 700


PARSERS = [
    (schema.parse_ip, IP_KEY),
    (schema.parse_node, NODE_KEY),
    (schema.parse_identity_id, ID_KEY),
    (schema.parse_identity_value, VALUE_KEY),
    (schema.parse_external, "holdfast/external/v1/a"),
    (schema.parse_policy, "holdfast/policies/v1/a"),
    (schema.parse_maintenance, "holdfast/maintenance/v1/a"),
]
_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_FIELDS = ["IP", "Mask", "HostIP", "ID", "Key", "Metadata", "NamedPorts", "Name", "Cluster", "IPAddresses"]
_FIELDS += ["IPv4AllocCIDR", "Labels", "name", "addresses", "labels", "host_ip"]
_likely = st.sampled_from(["10.0.0.1", "n1", "default", "a", "////AA==", 300, None])
_record = st.dictionaries(st.sampled_from(_FIELDS), _json | _likely).map(
    lambda each: json.dumps(each).encode()
)


def outcome(parse: Callable[[str, bytes], object], key: str, value: bytes) -> str:
    """Return "parsed", or the key that the RecordError names; anything else raised fails the test."""
    try:
        parse(key, value)
    except RecordError as error:
        return error.key
    return "parsed"


@settings(max_examples=300, deadline=None)
@given(value=st.binary(max_size=200) | _record)
@example(value=b'{"IP":"10.0.0.1","Mask":""}')
@example(value=b'{"IP":"10.0.0.1\\u0000"}')
@example(value=b'{"IP":"\\ud800"}')
def test_parsers_return_or_raise_record_error(value: bytes) -> None:
    for parse, key in PARSERS:
        assert outcome(parse, key, value) in ("parsed", key)


_ADDRESSES = ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2", "10.0.0.0/24", "10.0.0.01", "FD00::1", "nonsense"]
_HOSTS = ["", "", "192.0.2.1", "fd00::9", "host"]


@st.composite
def ip_items(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """Records as they may stand side by side: nearly alike, or one of them bad in some way."""
    alike = draw(st.booleans())
    pool = _ADDRESSES[:2] if alike else _ADDRESSES
    spaces = ["default"] if alike else ["default", "east", "", "a/b"]
    items = []
    for address in draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4)):
        spoken = draw(st.sampled_from([address, address, "10.0.0.9"])) if not alike else address
        record = {"IP": spoken.partition("/")[0], "ID": 300, "HostIP": draw(st.sampled_from(_HOSTS))}
        if "/" in address:
            record["Mask"] = "////AA=="
        value = json.dumps(record | draw(st.sampled_from([{}, {"Mask": None}, {"Key": 7}, {"Mask": ""}])))
        items.append((f"{schema.IPS}{draw(st.sampled_from(spaces))}/{address}", value.encode()))
    if not alike and draw(st.booleans()):
        items[-1] = (items[-1][0], draw(st.sampled_from([b"", b"[]", b"{}", b" " * 70_000])))
    return items


@settings(max_examples=300, deadline=None)
@given(items=ip_items())
def test_records_read_together_are_what_they_are_one_by_one(items: list[tuple[str, bytes]]) -> None:
    plain = schema.parse_plain_ips(items)
    if plain is not None:
        assert [(plain.space, record) for record in plain.records] == [
            schema.parse_ip_entry(*item) for item in items
        ]
        assert {record.prefix.count(":") > 0 for record in plain.records} == {plain.length == 128}


@pytest.mark.parametrize(
    ("addresses", "length"), [(("10.0.0.1", "10.0.0.2"), 32), (("fd00::1", "fd00::2"), 128)]
)
def test_records_that_are_alike_are_read_together(addresses: tuple[str, ...], length: int) -> None:
    items = [
        (schema.ip_key("default", each), schema.encode_ip(schema.ip_record(each, 300, host_ip="192.0.2.1")))
        for each in addresses
    ]
    plain = schema.parse_plain_ips(items)
    assert plain is not None
    assert (plain.space, plain.length) == ("default", length)
    assert [record.ip for record in plain.records] == list(addresses)
    assert schema.parse_plain_ips([*items, (schema.ip_key("east", "10.0.0.3"), items[0][1])]) is None


@settings(max_examples=300, deadline=None)
@given(key=st.text(max_size=40), base=st.sampled_from([prefix.prefix for prefix in schema.PREFIXES]))
def test_parsers_survive_any_key(key: str, base: str) -> None:
    for parse, _ in PARSERS:
        assert outcome(parse, base + key, b"300") in ("parsed", base + key)


# --- builders


@pytest.mark.parametrize("name", ["", "a/b/c", "a/", "-a", "a b", "a\n", "ä", "a" * 254, ".."])
def test_names_that_would_change_the_key_are_refused(name: str) -> None:
    builders = (schema.policy_key, schema.external_key, schema.election_key, schema.ip_space_prefix)
    for build in (*builders, schema.maintenance_key):
        with pytest.raises(InvalidKeyPart):
            build(name)
    with pytest.raises(InvalidKeyPart):
        schema.node_key("default", name)


@pytest.mark.parametrize("labels", ["", "container:app=a", "container:app=a;\n;", "x" * 20_000 + ";"])
def test_labels_that_are_none_are_refused(labels: str) -> None:
    with pytest.raises(InvalidKeyPart):
        schema.identity_value_prefix(labels)


@pytest.mark.parametrize("address", ["", "10.0.0", "10.0.0.1/24", "fd00::1/64", "x", "10.0.0.1/33"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(InvalidKeyPart):
        schema.ip_key("default", address)
    with pytest.raises(InvalidKeyPart):
        schema.ip_record(address, 1)


def test_canonical_spelling_of_addresses_in_keys() -> None:
    assert schema.ip_key("default", "FD00:0::1") == "cilium/state/ip/v1/default/fd00::1"
    assert base64.b64encode(schema.ip_record("10.0.0.0/24", 1).mask or b"") == b"////AA=="


def test_scope_is_a_small_set() -> None:
    assert schema.scope_of(IP_KEY) == "cilium/state/ip/v1"
    assert schema.scope_of("anything") == "other"


# --- one place


def test_nobody_else_puts_keys_together() -> None:
    """Keys come from kvstore.schema; bench and tests may spell them out to look from outside."""
    literal = re.compile(r"""["'](cilium|holdfast)/""")
    folders = ["agent", "certs", "cli", "core", "datapath", "external_resources", "identity", "kvstore"]
    folders += ["policy", "prestart"]
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        if path.parent.name != "schema"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if literal.search(line)
    ]
    assert found == []
