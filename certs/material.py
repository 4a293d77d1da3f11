# SPDX-License-Identifier: Apache-2.0
"""One key or certificate: from its file, into its file, and do the two belong together.

Everything that cryptography raises becomes an error that names the file, here and nowhere else.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certs.errors import CertificateError, Damaged, Exposed, Foreign, KeyMismatch, Missing, OutOfDate
from certs.layout import CERTIFICATE_MODE, FOLDER_MODE, KEY_MODE, Folder
from core.files import write_atomic

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
OTHERS = 0o007


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: PrivateKey

    def __repr__(self) -> str:
        return f"Pair({self.certificate.subject.rfc4514_string()!r})"


def new_key() -> PrivateKey:
    """Return a new key on P-256: small, fast, and what every TLS stack reads."""
    return ec.generate_private_key(ec.SECP256R1())


def load_certificate(path: Path) -> x509.Certificate:
    """Return the first certificate of a PEM file; Missing or Damaged."""
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise Damaged(
            f"{path} is not a PEM certificate", hint="restore it, or issue a new one with --renew"
        ) from error


def load_key(path: Path) -> PrivateKey:
    """Return an unencrypted private key; Missing, Damaged or Exposed (readable by everybody)."""
    data = _read(path)
    mode = path.stat().st_mode & 0o777
    if mode & OTHERS:
        raise Exposed(
            f"private key {path} has mode {mode:04o}: every user of this host can get at it",
            hint=f"chmod 600 {path}; if there are other users, issue a new one with --renew",
        )
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise Damaged(
            f"private key {path} is encrypted", hint="store it without a passphrase, 0600"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Damaged(
            f"{path} is not a PEM private key", hint="restore it, or issue a new one with --renew"
        ) from error
    if not isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise Damaged(f"private key {path} is neither EC nor RSA", hint="issue a new one with --renew")
    return key


def load_pair(folder: Folder) -> Pair:
    """Return certificate and key of a folder; KeyMismatch when they do not belong together."""
    pair = Pair(load_certificate(folder.certificate), load_key(folder.key))
    if public_bytes(pair.certificate.public_key()) != public_bytes(pair.key.public_key()):
        raise KeyMismatch(
            f"{folder.certificate} was not made for the key {folder.key}",
            hint="restore the pair from one backup, or issue a new one with --renew",
        )
    return pair


def check_issuer(certificate: x509.Certificate, authority: x509.Certificate, path: Path) -> None:
    """Raise Foreign unless `authority` is a CA and signed `certificate`, which lies at `path`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise Foreign(
            f"{path} was not signed by the CA {authority.subject.rfc4514_string()!r} "
            f"(its issuer is {certificate.issuer.rfc4514_string()!r})",
            hint="use the CA that signed it, or issue a new one with --renew",
        ) from error


def check_authority(certificate: x509.Certificate, path: Path) -> None:
    """Raise Foreign unless the certificate at `path` may sign others."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        is_authority = constraints.ca
    except (x509.ExtensionNotFound, ValueError):
        is_authority = False
    if not is_authority:
        raise Foreign(f"{path} is not a CA certificate", hint="put the CA's own certificate there")


def check_dates(certificate: x509.Certificate, path: Path, now: datetime.datetime) -> None:
    """Raise OutOfDate when `now` is outside the certificate's validity."""
    if now > certificate.not_valid_after_utc:
        raise OutOfDate(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
            hint="issue a new one with --renew",
        )
    if now < certificate.not_valid_before_utc:
        raise OutOfDate(
            f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            hint="check this host's clock",
        )


def write_certificate(path: Path, *certificates: x509.Certificate) -> None:
    """Write one or more certificates, readable by all."""
    pem = b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)
    write_file(path, pem, CERTIFICATE_MODE)


def write_key(path: Path, key: PrivateKey) -> None:
    """Write a private key, readable by its owner alone from the first byte on."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_file(path, pem, KEY_MODE)


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Write a file into its folder, which is made if need be; CertificateError when that fails."""
    try:
        path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        write_atomic(path, data, mode=mode)
    except OSError as error:
        raise CertificateError(f"{path} can not be written: {error.strerror}") from error


def public_bytes(key: object) -> bytes:
    """Return a public key's DER form, by which two keys are compared."""
    if not hasattr(key, "public_bytes"):
        return b""
    encoded: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Missing(f"{path} does not exist", hint="python -m certs init makes what is missing") from error
    except OSError as error:
        raise Damaged(f"{path} can not be read: {error.strerror}") from error
