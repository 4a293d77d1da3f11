# SPDX-License-Identifier: Apache-2.0
"""What an external resource is, and the keys that follow from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_resources.errors import InvalidResource
from external_resources.resource import Resource, canonical_address, owned_by
from identity.labels import Labels
from kvstore import schema

# Three entries of a VM that a real cilium-agent 1.11 accepted, with the host that the VM is on.
ACCEPTED = {
    "cilium/state/identities/v1/id/4242": b"container:app=legacyvm;container:site=dc1;",
    "cilium/state/ip/v1/default/10.77.0.5": b'{"IP":"10.77.0.5","Mask":null,"HostIP":"192.0.2.10","ID":4242,'
    b'"Key":0,"Metadata":"vm:legacy-1"}',
}
LABELS = {"app": "legacyvm", "site": "dc1"}


def test_derived_keys_equal_what_a_real_agent_accepted() -> None:
    resource = Resource.of("legacy-1", ["10.77.0.5"], LABELS, host_ip="192.0.2.10")
    keys = resource.keys(4242)
    assert keys.items() >= ACCEPTED.items()
    # Its own user of the identity, so that it releases nobody else's.
    value = "cilium/state/identities/v1/value/container:app=legacyvm;container:site=dc1;/10.77.0.5"
    assert keys[value] == b"4242"
    assert len(keys) == 3


def test_without_a_host_the_host_address_is_empty() -> None:
    keys = Resource.of("legacy-1", ["10.77.0.5"], LABELS).keys(4242)
    assert b'"HostIP":""' in keys["cilium/state/ip/v1/default/10.77.0.5"]


def test_a_prefix_has_its_mask_and_owns_by_its_first_address() -> None:
    keys = Resource.of("rack", ["10.78.0.0/24", "2001:db8::5"], LABELS).keys(4242, "c8")
    assert b'"IP":"10.78.0.0","Mask":"////AA=="' in keys["cilium/state/ip/v1/c8/10.78.0.0/24"]
    assert "cilium/state/ip/v1/c8/2001:db8::5" in keys
    assert any(key.endswith(";/10.78.0.0") for key in keys)


def test_record_and_back() -> None:
    resource = Resource.of(
        "legacy-1", ["10.77.0.5/32", "10.77.0.5", "10.78.0.0/24"], ["app=x", "k8s:y"], description="a <b>"
    )
    assert resource.addresses == ("10.77.0.5", "10.78.0.0/24")
    key, value = schema.external_key("legacy-1"), schema.encode_external(resource.record())
    assert Resource.from_record(schema.parse_external(key, value)) == resource
    assert resource.labels == Labels.parse("container:app=x;k8s:y=;")


@pytest.mark.parametrize(
    ("name", "addresses", "labels", "reason"),
    [
        ("", ["10.0.0.1"], LABELS, "name|external resource"),
        ("a/b", ["10.0.0.1"], LABELS, "a/b"),
        ("vm", [], LABELS, "0 addresses"),
        ("vm", ["10.0.0.300"], LABELS, r"10\.0\.0\.300"),
        ("vm", ["10.0.0.1/24"], LABELS, "host bits"),
        ("vm", ["0.0.0.0/0"], LABELS, "every address"),
        ("vm", [f"10.0.0.{n}" for n in range(60)], LABELS, "60 addresses"),
        ("vm", ["10.0.0.1"], {}, "no labels"),
        ("vm", ["10.0.0.1"], {"app": "x;k8s:role=admin"}, "role=admin"),
        ("vm", ["10.0.0.1"], ["reserved:host"], "reserved:host"),
        ("vm", ["10.0.0.1"], ["cidr:10.0.0.0/8"], "cidr"),
    ],
)
def test_what_can_not_be_a_resource(
    name: str, addresses: list[str], labels: dict[str, str], reason: str
) -> None:
    with pytest.raises(InvalidResource, match=reason):
        Resource.of(name, addresses, labels)


def test_a_bad_host_address() -> None:
    with pytest.raises(InvalidResource, match="nowhere"):
        Resource.of("vm", ["10.0.0.1"], LABELS, host_ip="nowhere")


def test_owner_of_an_address_record() -> None:
    record = schema.ip_record("10.0.0.1", 4242, metadata="vm:legacy-1")
    assert owned_by("legacy-1", record)
    assert not owned_by("legacy", record)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = canonical_address(text)
    except ValueError:
        return
    assert canonical_address(address) == address
