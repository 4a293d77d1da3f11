# SPDX-License-Identifier: Apache-2.0
"""The errors about keys and certificates; each names the file and says what to do.

HoldfastError
└── CertificateError
    ├── Damaged       a file that is not the PEM it should be, or can not be read
    ├── Missing       a file that is needed and not there
    ├── KeyMismatch   a certificate that was made for another key
    ├── Foreign       a certificate that another CA signed, or a CA that is none
    ├── OutOfDate     expired, or not valid yet
    ├── Exposed       a private key that everybody on the host can read
    └── BadRequest    a name or address that can not stand in a certificate
"""

from __future__ import annotations

from core.errors import HoldfastError


class CertificateError(HoldfastError):
    """The root of this package's errors."""


class Damaged(CertificateError):
    """Raised when a file can not be read as the key or certificate it should hold."""


class Missing(CertificateError):
    """Raised when a key or certificate that is needed does not exist."""


class KeyMismatch(CertificateError):
    """Raised when key and certificate lie side by side and do not belong together."""


class Foreign(CertificateError):
    """Raised when a certificate was not signed by our CA."""


class OutOfDate(CertificateError):
    """Raised when today is outside a certificate's validity."""


class Exposed(CertificateError):
    """Raised when others than owner and group may touch a private key."""


class BadRequest(CertificateError):
    """Raised for a name, address or validity that no certificate can be made for."""
