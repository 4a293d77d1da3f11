# SPDX-License-Identifier: Apache-2.0
"""What can be wrong about a policy.

HoldfastError
└── PolicyError
    ├── DocumentError        text that is no YAML or JSON, repeats a key, or is beyond a limit
    ├── PolicyNameError      a name that is missing, malformed or used twice
    ├── FieldError           a field with a wrong type or value
    │   ├── UnknownField     a field the language does not have
    │   └── UnsupportedField a field of Cilium's that is not enforced here
    └── PolicyMapOverflow    an endpoint's resolved policy does not fit into its map

Everything but the last refuses the whole text: a policy is never applied in part.
"""

from __future__ import annotations

from core.errors import HoldfastError


class PolicyError(HoldfastError):
    """Root of this package's errors."""


class DocumentError(PolicyError):
    """Raised for a text that can not be read as policy documents.  `line` counts from 1; 0 is unknown."""

    def __init__(self, origin: str, line: int, problem: str, *, hint: str = "") -> None:
        super().__init__(f"{where(origin, line)}: {problem}", hint=hint)
        self.origin = origin
        self.line = line


class PolicyNameError(PolicyError):
    """Raised for a policy without a usable name, or with one that is taken."""


class FieldError(PolicyError):
    """Raised for a field that can not be used.  `path` is its full path, as ``spec.ingress[0].toPorts``."""

    def __init__(self, origin: str, line: int, path: str, problem: str, *, hint: str = "") -> None:
        super().__init__(f"{where(origin, line)}: {path or 'the document'}: {problem}", hint=hint)
        self.origin = origin
        self.line = line
        self.path = path


class UnknownField(FieldError):
    """Raised for a field name that the policy language does not have."""


class UnsupportedField(FieldError):
    """Raised for a field that Cilium has and Holdfast does not enforce: ignoring it would change what
    the policy means."""


class PolicyMapOverflow(PolicyError):
    """Raised or reported when an endpoint's policy needs more entries than its map holds.

    The endpoint keeps the last state that fitted; `entries` is what it would need, `limit` what fits.
    """

    def __init__(self, endpoint_id: int, entries: int, limit: int) -> None:
        super().__init__(
            f"the policy of endpoint {endpoint_id} needs {entries} map entries, its map holds {limit}; "
            "the last state that fitted stays in force",
            hint="select fewer identities or ports: wider selectors on fewer labels, `all` or a CIDR",
        )
        self.endpoint_id = endpoint_id
        self.entries = entries
        self.limit = limit


def where(origin: str, line: int) -> str:
    """Return ``origin, line n``, or the origin alone where the line is unknown (JSON)."""
    return f"{origin}, line {line}" if line else origin
