# SPDX-License-Identifier: Apache-2.0
"""The root of every error that Holdfast raises on purpose.

Each package derives its own tree from here, in its own ``errors`` module:

    HoldfastError
    ├── core.options.OptionError            a configuration value that can not be used
    ├── core.files.FileDamaged              a state file that can not be read as what it should be
    ├── kvstore.errors.KvstoreError         anything etcd said or failed to say
    ├── identity.errors.IdentityError       labels, filters, numbers, allocation
    ├── policy.errors.PolicyError           a policy document that is refused
    ├── datapath.errors.DatapathError       kernel objects: load, attach, maps, devices, rules
    ├── certs.errors.CertificateError       keys and certificates
    └── agent.errors.AgentError             endpoints, the engine, the API

A message names the thing, its value and where it came from; the hint says what to do about it.
"""

from __future__ import annotations


class HoldfastError(Exception):
    """An error with a message that an operator can act on.

    `hint` is one sentence that says what to do; it is printed after the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def shorten(value: object, limit: int = 120) -> str:
    """Return `value` as text for a message: control characters escaped, at most `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
