# SPDX-License-Identifier: Apache-2.0
"""Certificates as values: what stands in them, how long they hold, and what openssl says of them."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from certs import authority
from certs.errors import BadRequest, Foreign
from certs.inspect import summarize
from certs.issue import PEER_NAME, Request, check_name, general_name, issue
from certs.layout import Holder
from certs.material import Pair, check_issuer, public_bytes, write_certificate
from tests.support.require import require_tools

Extension = TypeVar("Extension", bound=x509.ExtensionType)
NOW = datetime.datetime(2026, 6, 1, 12, 0, 0, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def ca() -> Pair:
    return authority.create()


def extension(certificate: x509.Certificate, kind: type[Extension]) -> Extension:
    return certificate.extensions.get_extension_for_class(kind).value


def test_authority_signs_certificates_and_nothing_else(ca: Pair) -> None:
    constraints = extension(ca.certificate, x509.BasicConstraints)
    usage = extension(ca.certificate, x509.KeyUsage)
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert isinstance(ca.key, ec.EllipticCurvePrivateKey)
    assert ca.key.curve.name == "secp256r1"
    years = (ca.certificate.not_valid_after_utc - ca.certificate.not_valid_before_utc).days / 365.25
    assert years == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize(
    ("holder", "name", "user", "group"),
    [
        (Holder.AGENT, "host-1.example", "agent:host-1.example", "holdfast-agents"),
        (Holder.OPERATOR, "alice", "operator:alice", "holdfast-operators"),
        (Holder.ETCD, "etcd-0", "etcd:etcd-0", "holdfast-etcd"),
    ],
)
def test_user_and_group_name_the_role(ca: Pair, holder: Holder, name: str, user: str, group: str) -> None:
    summary = summarize(issue(ca, Request(holder, name)).certificate)
    assert (summary.common_name, summary.group, summary.issuer) == (user, group, authority.NAME)


def test_clients_are_clients_and_members_are_both(ca: Pair) -> None:
    client = issue(ca, Request(Holder.AGENT, "a")).certificate
    member = issue(ca, Request(Holder.ETCD, "a")).certificate
    assert list(extension(client, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert set(extension(member, x509.ExtendedKeyUsage)) == {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    }
    for certificate in (client, member):
        assert not extension(certificate, x509.BasicConstraints).ca
        assert extension(certificate, x509.KeyUsage).digital_signature


def test_member_answers_to_its_name_addresses_and_loopback(ca: Pair) -> None:
    request = Request(Holder.ETCD, "etcd-0", ("10.1.2.3", "fd00::1", "kv.example", "10.1.2.3"))
    names = extension(issue(ca, request).certificate, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["etcd-0", "kv.example", "localhost", PEER_NAME]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == [
        "10.1.2.3",
        "fd00::1",
        "127.0.0.1",
        "::1",
    ]


def test_key_identifiers_link_leaf_to_authority(ca: Pair) -> None:
    leaf = issue(ca, Request(Holder.AGENT, "a")).certificate
    authority_id = extension(ca.certificate, x509.SubjectKeyIdentifier).digest
    assert extension(leaf, x509.AuthorityKeyIdentifier).key_identifier == authority_id
    assert extension(leaf, x509.SubjectKeyIdentifier).digest != authority_id


def test_serials_differ_and_are_positive(ca: Pair) -> None:
    serials = {issue(ca, Request(Holder.AGENT, "a")).certificate.serial_number for _ in range(8)}
    assert len(serials) == 8
    assert min(serials) > 0


def test_validity_begins_a_little_earlier_and_never_outlives_the_authority() -> None:
    short = authority.create(validity=datetime.timedelta(days=10), now=NOW)
    leaf = issue(short, Request(Holder.AGENT, "a"), now=NOW).certificate
    assert leaf.not_valid_before_utc == NOW - datetime.timedelta(minutes=5)
    assert leaf.not_valid_after_utc == short.certificate.not_valid_after_utc
    long = authority.create(now=NOW)
    assert issue(long, Request(Holder.AGENT, "a"), now=NOW).certificate.not_valid_after_utc == NOW.replace(
        year=2027
    )


def test_given_key_is_kept(ca: Pair) -> None:
    first = issue(ca, Request(Holder.AGENT, "a"))
    second = issue(ca, Request(Holder.AGENT, "a"), key=first.key)
    assert public_bytes(second.certificate.public_key()) == public_bytes(first.key.public_key())


def test_foreign_authority_is_recognised_even_under_the_same_name(ca: Pair) -> None:
    leaf = issue(ca, Request(Holder.AGENT, "a")).certificate
    check_issuer(leaf, ca.certificate, Path("agent.crt"))
    with pytest.raises(
        Foreign, match=r"agent\.crt was not signed by the CA 'O=holdfast,CN=Holdfast CA'|agent\.crt"
    ):
        check_issuer(leaf, authority.create().certificate, Path("agent.crt"))


@pytest.mark.parametrize("name", ["", "-x", "a b", "a\nb", "a/b", "ä", "x" * 59, "a\x00b", "a:"])
def test_impossible_names_are_refused(ca: Pair, name: str) -> None:
    with pytest.raises(BadRequest, match="can not be the name in a certificate"):
        issue(ca, Request(Holder.AGENT, name))


@pytest.mark.parametrize(
    "address", ["", "10.1.2.3:2379", "https://a", "10.1.2.999", "a..b", "-a", "*.example", "x" * 300, "a b"]
)
def test_impossible_addresses_are_refused(ca: Pair, address: str) -> None:
    with pytest.raises(BadRequest, match="neither an IP address nor a host name"):
        issue(ca, Request(Holder.ETCD, "etcd", (address,)))


@given(st.text(max_size=80))
def test_a_name_is_refused_or_can_be_written(name: str) -> None:
    try:
        checked = check_name(name)
    except BadRequest:
        return
    assert checked.isascii()
    x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, checked)


@given(st.ip_addresses())
def test_every_address_is_an_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert general_name(str(address)) == x509.IPAddress(address)


def test_no_secret_in_the_text_of_a_pair(ca: Pair) -> None:
    assert repr(ca) == "Pair('CN=Holdfast CA,O=holdfast')"


@pytest.mark.parametrize(
    ("holder", "purpose"),
    [
        (Holder.AGENT, "sslclient"),
        (Holder.OPERATOR, "sslclient"),
        (Holder.ETCD, "sslclient"),
        (Holder.ETCD, "sslserver"),
    ],
)
def test_openssl_verifies_the_chain(ca: Pair, tmp_path: Path, holder: Holder, purpose: str) -> None:
    require_tools("openssl")
    write_certificate(tmp_path / "ca.crt", ca.certificate)
    write_certificate(tmp_path / "leaf.crt", issue(ca, Request(holder, "a", ())).certificate)
    write_certificate(tmp_path / "other.crt", authority.create().certificate)
    assert openssl_verify(tmp_path / "ca.crt", tmp_path / "leaf.crt", purpose) == 0
    assert openssl_verify(tmp_path / "other.crt", tmp_path / "leaf.crt", purpose) != 0


def test_openssl_refuses_a_client_as_server(ca: Pair, tmp_path: Path) -> None:
    require_tools("openssl")
    write_certificate(tmp_path / "ca.crt", ca.certificate)
    write_certificate(tmp_path / "leaf.crt", issue(ca, Request(Holder.AGENT, "a")).certificate)
    assert openssl_verify(tmp_path / "ca.crt", tmp_path / "leaf.crt", "sslserver") != 0


def openssl_verify(authority_file: Path, leaf: Path, purpose: str) -> int:
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-purpose",
        purpose,
        "-CAfile",
        str(authority_file),
        str(leaf),
    ]
    return subprocess.run(command, capture_output=True, timeout=30).returncode
