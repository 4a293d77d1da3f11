# SPDX-License-Identifier: Apache-2.0
"""Errors of the API, each with the HTTP code it becomes.

    ApiError                 500
    ├── BadRequest           400   the request can not be used as it is
    ├── NotFound             404   no such endpoint, identity, map, policy…
    ├── Conflict             409   it exists already, or something else owns that name
    ├── TooLarge             413   the body is longer than the limit
    └── NotReady             503   the agent can not do that now; trying again later may work

An `AgentView` raises these.  Errors of the libraries have a code of their own, see `code_of`.
"""

from __future__ import annotations

from agent.errors import AddressTaken, AgentError, EndpointNotFound, EndpointRefused, TooManyCalls
from core.errors import HoldfastError
from core.options import OptionError
from identity.errors import IdentityError
from kvstore.errors import KvstoreError
from policy.errors import PolicyError


class ApiError(AgentError):
    """The root: raised for what the agent did wrong itself."""

    code = 500


class BadRequest(ApiError):
    """Raised when a body, a path or a query can not be used."""

    code = 400


class NotFound(ApiError):
    """Raised when the named thing does not exist."""

    code = 404


class Conflict(ApiError):
    """Raised when the named thing exists already or belongs to somebody else."""

    code = 409


class TooLarge(ApiError):
    """Raised when a body is longer than the limit."""

    code = 413


class NotReady(ApiError):
    """Raised when the agent can not do that at present."""

    code = 503


# The first that fits counts.  Whoever asks gives a policy, a label or an option: 400; asks too often: 429.
# The pool, the engine and etcd may be back later: 503.  Anything else, the kernel's refusals above all, is
# ours: 500.
_CODES: tuple[tuple[type[HoldfastError], int], ...] = (
    (EndpointNotFound, 404),
    (AddressTaken, 409),
    (EndpointRefused, 400),
    (TooManyCalls, 429),
    (AgentError, 503),
    (PolicyError, 400),
    (IdentityError, 400),
    (OptionError, 400),
    (KvstoreError, 503),
)


def code_of(error: HoldfastError) -> int:
    """Return the HTTP code of any error that Holdfast raises on purpose."""
    if isinstance(error, ApiError):
        return error.code
    return next((code for type_, code in _CODES if isinstance(error, type_)), 500)
