# SPDX-License-Identifier: Apache-2.0
"""A throw-away certificate authority for tests of TLS connections (P-256, one day)."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID, EXPIRED = datetime.timedelta(days=1), datetime.timedelta(minutes=-30)


class TestPki:
    """Writes `ca.crt` and `<name>.crt`, `<name>.key` into a directory."""

    __test__ = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._ca = _builder("test-ca", "test-ca", self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self._certificate = self._ca.sign(self._key, hashes.SHA256())
        self.ca = directory / "ca.crt"
        self.ca.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, expired: bool = False) -> tuple[Path, Path]:
        """Return the paths of a certificate (client and server, for loopback) and its key.

        `expired`: it was good until half an hour ago.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        certificate = (
            _builder(name, "test-ca", key, EXPIRED if expired else VALID)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        crt, private = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        crt.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return crt, private


def _builder(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, until: datetime.timedelta = VALID
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + until)
    )
