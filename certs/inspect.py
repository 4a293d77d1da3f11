# SPDX-License-Identifier: Apache-2.0
"""What lies in a folder, and in what state: one `Finding` per holder.  Reads files, changes nothing."""

from __future__ import annotations

import datetime
import enum
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

from certs.errors import CertificateError
from certs.layout import Folder, Holder
from certs.material import (
    check_authority,
    check_dates,
    check_issuer,
    load_certificate,
    load_key,
    load_pair,
    public_bytes,
)

# A month: long enough for a monthly round of maintenance to see it once.
SOON = datetime.timedelta(days=30)


class Condition(enum.Enum):
    """The state of one holder's files."""

    GOOD = "good"
    ABSENT = "absent"  # neither key nor certificate
    KEY_ONLY = "key only"  # an interrupted issue, or a key made elsewhere
    PUBLIC_ONLY = "certificate only"  # of the CA: its key is kept offline
    EXPIRING = "expires soon"
    BROKEN = "broken"  # `detail` says how, and what to do


@dataclass(frozen=True)
class Summary:
    """What a certificate says; times are UTC."""

    common_name: str
    group: str
    issuer: str
    serial: str
    not_before: datetime.datetime
    not_after: datetime.datetime
    names: frozenset[str]


@dataclass(frozen=True)
class Finding:
    """One holder's state; `summary` is None when there is no readable certificate."""

    folder: Folder
    condition: Condition
    detail: str = ""
    summary: Summary | None = None
    has_authority: bool = True  # the folder's ca.crt is the CA's certificate

    @property
    def holder(self) -> Holder:
        return self.folder.holder


def examine(
    folder: Folder,
    authority: x509.Certificate | None,
    now: datetime.datetime,
    *,
    soon: datetime.timedelta = SOON,
) -> Finding:
    """Return the state of a folder; `authority` is the CA that must have signed it, None if there is none."""
    if not folder.certificate.exists() and not folder.key.exists():
        return Finding(folder, Condition.ABSENT, f"{folder.path} holds no certificate")
    summary = None
    try:
        if not folder.certificate.exists():
            load_key(folder.key)
            return Finding(folder, Condition.KEY_ONLY, f"{folder.certificate} does not exist")
        certificate = load_certificate(folder.certificate)
        summary = summarize(certificate)
        _check_signature(folder, certificate, authority)
        check_dates(certificate, folder.certificate, now)
        if folder.holder is Holder.AUTHORITY and not folder.key.exists():
            return Finding(folder, Condition.PUBLIC_ONLY, f"{folder.key} does not exist", summary)
        load_pair(folder)
    except CertificateError as error:
        return Finding(folder, Condition.BROKEN, str(error), summary)
    return _dated(folder, summary, authority, now, soon)


def summarize(certificate: x509.Certificate) -> Summary:
    """Return what is worth showing of a certificate."""
    return Summary(
        _attribute(certificate.subject, NameOID.COMMON_NAME),
        _attribute(certificate.subject, NameOID.ORGANIZATION_NAME),
        _attribute(certificate.issuer, NameOID.COMMON_NAME),
        f"{certificate.serial_number:x}",
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        _names(certificate),
    )


def _dated(
    folder: Folder,
    summary: Summary,
    authority: x509.Certificate | None,
    now: datetime.datetime,
    soon: datetime.timedelta,
) -> Finding:
    has_authority = _has_authority(folder, authority)
    if summary.not_after - now < soon:
        detail = f"{folder.certificate} expires on {summary.not_after:%Y-%m-%d}"
        return Finding(folder, Condition.EXPIRING, detail, summary, has_authority)
    return Finding(folder, Condition.GOOD, "", summary, has_authority)


def _check_signature(
    folder: Folder, certificate: x509.Certificate, authority: x509.Certificate | None
) -> None:
    if folder.holder is Holder.AUTHORITY:
        check_authority(certificate, folder.certificate)
    elif authority is not None:
        check_issuer(certificate, authority, folder.certificate)


def _has_authority(folder: Folder, authority: x509.Certificate | None) -> bool:
    if folder.holder is Holder.AUTHORITY or authority is None:
        return True
    try:
        copy = load_certificate(folder.authority)
    except CertificateError:
        return False
    return public_bytes(copy.public_key()) == public_bytes(authority.public_key()) and copy == authority


def _attribute(name: x509.Name, oid: x509.ObjectIdentifier) -> str:
    values = name.get_attributes_for_oid(oid)
    return str(values[0].value) if values else ""


def _names(certificate: x509.Certificate) -> frozenset[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return frozenset()
    dns = names.get_values_for_type(x509.DNSName)
    return frozenset([*dns, *map(str, names.get_values_for_type(x509.IPAddress))])
