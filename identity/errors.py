# SPDX-License-Identifier: Apache-2.0
"""What can be wrong about identities.

HoldfastError
└── IdentityError
    ├── LabelError           a label or label text that can not be part of an identity
    ├── FilterError          an expression of the label filter that can not be used
    ├── NumberError          a number or cluster id outside its range
    ├── RangeExhausted       no free number is left in the range
    └── AllocationFailed     the store's answers led nowhere within the bounded number of attempts
"""

from __future__ import annotations

from core.errors import HoldfastError


class IdentityError(HoldfastError):
    """Root of this package's errors."""


class LabelError(IdentityError):
    """Raised for a label that is empty, oversized or holds a character that would forge another one."""


class FilterError(IdentityError):
    """Raised for a filter expression or prefix file that can not be used."""


class PrefixError(IdentityError):
    """Raised for a text that is no address or address prefix."""


class NumberError(IdentityError):
    """Raised for an identity number or cluster id outside its range."""


class RangeExhausted(IdentityError):
    """Raised when every number of a range is taken."""


class AllocationFailed(IdentityError):
    """Raised when an allocation found no way after its last attempt (never for an etcd that is away)."""
