# SPDX-License-Identifier: Apache-2.0
"""The certificate authority: a self-signed P-256 CA that signs leaves only (path length 0)."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from certs.errors import Missing
from certs.issue import CLOCK_SKEW, ORGANIZATION, check_name, key_usage, utc_now
from certs.layout import Folder
from certs.material import Pair, check_authority, check_dates, load_certificate, load_pair, new_key

NAME = "Holdfast CA"
# Ten years: the CA is the one thing that a whole fleet has to be told about when it changes.
VALIDITY = datetime.timedelta(days=3652)


def create(
    name: str = NAME, *, validity: datetime.timedelta = VALIDITY, now: datetime.datetime | None = None
) -> Pair:
    """Return a new CA; BadRequest for a name that can not stand in a certificate."""
    moment = now or utc_now()
    key = new_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, check_name(name, spaces=True)),
        ]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - CLOCK_SKEW)
        .not_valid_after(moment + validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
    )
    return Pair(builder.sign(key, hashes.SHA256()), key)


def load(folder: Folder, *, now: datetime.datetime | None = None) -> Pair:
    """Return the CA that signs; CertificateError says which file is missing, damaged, foreign or expired."""
    try:
        pair = load_pair(folder)
    except Missing as error:
        raise Missing(
            error.message, hint="certificates are issued where the CA's key is; or make a CA with init"
        ) from error
    check_authority(pair.certificate, folder.certificate)
    check_dates(pair.certificate, folder.certificate, now or utc_now())
    return pair


def load_public(folder: Folder) -> x509.Certificate:
    """Return the CA's certificate from a folder, without its key."""
    certificate = load_certificate(folder.authority)
    check_authority(certificate, folder.authority)
    return certificate
