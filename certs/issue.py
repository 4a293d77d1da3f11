# SPDX-License-Identifier: Apache-2.0
"""Certificates for etcd members, agents and operators.  Pure: values in, a `Pair` out.

etcd takes the common name of a client's certificate as its user name, so the name carries the role
(``agent:<host>``, ``operator:<name>``): no host can be called into another role, or into etcd's ``root``.
The organization is the group that agents, members and operators have in common each.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.errors import BadRequest
from certs.layout import Holder
from certs.material import Pair, PrivateKey, new_key
from core.errors import shorten

ORGANIZATION = "holdfast"
GROUPS = {
    Holder.ETCD: "holdfast-etcd",
    Holder.AGENT: "holdfast-agents",
    Holder.OPERATOR: "holdfast-operators",
}
VALIDITY = datetime.timedelta(days=365)
# Certificates begin a little in the past: clocks of a fleet are never quite the same.
CLOCK_SKEW = datetime.timedelta(minutes=5)
# X.509 allows 64 characters in a common name.
LONGEST_NAME = 64
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What a member's certificate has and no other: by it members tell a peer from an agent (etcd's
# --peer-cert-allowed-hostname), whose certificates are the same CA's.
PEER_NAME = "peer.etcd.holdfast"


@dataclass(frozen=True)
class Request:
    """Who wants a certificate: `name` is the host's or person's, `addresses` IPs or DNS names of a server."""

    holder: Holder
    name: str
    addresses: tuple[str, ...] = ()

    @property
    def common_name(self) -> str:
        """The user name in etcd."""
        return check_name(f"{self.holder.value}:{check_name(self.name)}")

    @property
    def alternatives(self) -> tuple[x509.GeneralName, ...]:
        """The names a member answers to: its own, its addresses, loopback, and that of all members."""
        if self.holder is not Holder.ETCD:
            return ()
        names = dict.fromkeys((self.name, *self.addresses, *LOOPBACK, PEER_NAME))
        return tuple(map(general_name, names))


def utc_now() -> datetime.datetime:
    """Return the present, to the second, as certificates have it."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def issue(
    authority: Pair,
    request: Request,
    *,
    key: PrivateKey | None = None,
    validity: datetime.timedelta = VALIDITY,
    now: datetime.datetime | None = None,
) -> Pair:
    """Return a certificate for `key` (a new one if None), at most as long valid as the CA.

    Raises BadRequest for a name or address that can not stand in it.
    """
    moment = now or utc_now()
    own_key = key or new_key()
    end = min(moment + validity, authority.certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(request))
        .issuer_name(authority.certificate.subject)
        .public_key(own_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - CLOCK_SKEW)
        .not_valid_after(end)
    )
    for extension, critical in _extensions(authority, request, own_key):
        builder = builder.add_extension(extension, critical)
    return Pair(builder.sign(authority.key, hashes.SHA256()), own_key)


def check_name(name: str, *, spaces: bool = False) -> str:
    """Return `name`; BadRequest unless it can be a common name and a user name in etcd."""
    allowed = r"[A-Za-z0-9][A-Za-z0-9._:@ -]*" if spaces else r"[A-Za-z0-9][A-Za-z0-9._:@-]*"
    if len(name) > LONGEST_NAME or not re.fullmatch(allowed, name) or name.endswith((":", " ")):
        raise BadRequest(
            f"{shorten(name)!r} can not be the name in a certificate",
            hint=f"letters, digits, dot, dash and underscore, at most {LONGEST_NAME} with the role in front",
        )
    return name


def general_name(text: str) -> x509.GeneralName:
    """Return an IP address or DNS name for the list of alternative names; BadRequest otherwise."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    label = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
    # Four numbers that are no address are a typing error, not a host.
    if len(text) <= 253 and re.fullmatch(rf"{label}(\.{label})*", text) and not re.fullmatch(r"[\d.]+", text):
        return x509.DNSName(text)
    raise BadRequest(f"{shorten(text)!r} is neither an IP address nor a host name", hint="no port, no scheme")


def key_usage(*, authority: bool) -> x509.KeyUsage:
    """Return what a key may do: sign certificates and revocation lists, or sign TLS handshakes."""
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(request: Request) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, GROUPS[request.holder]),
            x509.NameAttribute(NameOID.COMMON_NAME, request.common_name),
        ]
    )


def _extensions(
    authority: Pair, request: Request, key: PrivateKey
) -> Sequence[tuple[x509.ExtensionType, bool]]:
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if request.holder is Holder.ETCD:  # a member is a client of its peers, too
        usages.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (key_usage(authority=False), True),
        (x509.ExtendedKeyUsage(usages), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (_signer(authority), False),
    ]
    if request.alternatives:
        extensions.append((x509.SubjectAlternativeName(request.alternatives), False))
    return extensions


def _signer(authority: Pair) -> x509.AuthorityKeyIdentifier:
    """Return the CA's key identifier as its own certificate has it: a foreign tool may count differently."""
    try:
        own = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        own = x509.SubjectKeyIdentifier.from_public_key(authority.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
