# SPDX-License-Identifier: Apache-2.0
"""The errors of the start hook.

HoldfastError
└── PrestartError
    ├── OptionRefused   a flag or environment variable that makes no sense: the start is refused
    └── StateRefused    a state or cluster file that can not be used: set aside, never fatal
"""

from __future__ import annotations

from core.errors import HoldfastError


class PrestartError(HoldfastError):
    """The root of this package's errors."""


class OptionRefused(PrestartError):
    """Raised for an option; the message says value, meaning and where the value came from."""


class StateRefused(PrestartError):
    """Raised when a file is empty, cut, of another version, of another host, or from the future."""
