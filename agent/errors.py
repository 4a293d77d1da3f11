# SPDX-License-Identifier: Apache-2.0
"""What the agent itself refuses or fails to do.

AgentError
├── EngineError        the container engine did not answer, or said no
├── DriverError        a network driver call that can not be carried out; its text reaches the user
│   └── UnknownNetwork a call for a network this host does not know
├── PoolExhausted      no address is left in the node's pool
├── AddressTaken       an address that was asked for belongs to another endpoint
├── EndpointNotFound   an endpoint number that this host does not have
├── EndpointRefused    an endpoint that can not be made as it was asked for
├── TooManyCalls       a call that did not get its turn in time (option api-rate-limit)
└── CheckpointDamaged  a record in the state directory that this agent can not have written
"""

from __future__ import annotations

from core.errors import HoldfastError


class AgentError(HoldfastError):
    """Root of this package's errors."""


class EngineError(AgentError):
    """Raised when the container engine can not be reached or refuses a request."""


class DriverError(AgentError):
    """Raised when a network driver call can not be carried out; the engine shows its text to the user."""


class UnknownNetwork(DriverError):
    """Raised when the engine speaks of a network that neither the checkpoint nor the engine describes."""


class PoolExhausted(AgentError):
    """Raised when the node's pool has no free address left."""


class AddressTaken(AgentError):
    """Raised when a requested address belongs to another endpoint or lies outside the pool."""


class EndpointNotFound(AgentError):
    """Raised for an endpoint number that this host does not have."""


class EndpointRefused(AgentError):
    """Raised when an endpoint can not be made from what was given."""


class TooManyCalls(AgentError):
    """Raised when a call waited for its turn for as long as its limit lets it."""


class CheckpointDamaged(AgentError):
    """Raised for a checkpoint's record that must not be used; its text says what is wrong with it."""
