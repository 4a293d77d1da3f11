# SPDX-License-Identifier: Apache-2.0
"""Identities: `id/<number>` holds the labels, `value/<labels>/<node address>` holds the number.

Labels stay text here ("container:app=web;container:env=prod;"); `identity.labels` understands them.
"""

from __future__ import annotations

from kvstore.errors import RecordError
from kvstore.schema import codec
from kvstore.schema.keys import IDENTITY_IDS, IDENTITY_VALUES, MAX_LABELS

MAX_NUMBER = (1 << 24) - 1


def encode_identity_id(labels: str) -> bytes:
    return labels.encode()


def encode_identity_value(number: int) -> bytes:
    return b"%d" % number


def parse_identity_id_key(key: str) -> int:
    """Return the number in `id/<number>`; RecordError unless it is one in its one spelling."""
    return _number(key, key[len(IDENTITY_IDS) :] if key.startswith(IDENTITY_IDS) else "")


def parse_identity_id(key: str, value: bytes) -> tuple[int, str]:
    """Return (number, labels text); RecordError when the key is no number or the value no label list."""
    number = parse_identity_id_key(key)
    labels = codec.text_of(key, value, limit=MAX_LABELS)
    _check_labels(key, labels)
    return number, labels


def parse_identity_value_key(key: str) -> tuple[str, str]:
    """Return (labels text, node address); the last `/` separates them."""
    labels, slash, node = key[len(IDENTITY_VALUES) :].rpartition("/")
    if not key.startswith(IDENTITY_VALUES) or not slash or not node:
        raise RecordError(key, "is not value/<labels>/<node address>", kind="key")
    _check_labels(key, labels)
    return labels, node


def parse_identity_value(key: str, value: bytes) -> tuple[str, str, int]:
    """Return (labels text, node address, number)."""
    labels, node = parse_identity_value_key(key)
    return labels, node, _number(key, codec.text_of(key, value))


def _number(key: str, text: str) -> int:
    # The one canonical spelling: "0042" or "+42" would be a second key for identity 42.
    if not (text.isascii() and text.isdigit()) or text[0] == "0" or len(text) > 8 or int(text) > MAX_NUMBER:
        raise RecordError(key, f"{text[:40]!r} is not the number of a cluster identity")
    return int(text)


def _check_labels(key: str, labels: str) -> None:
    if not labels.endswith(";"):
        raise RecordError(key, "the labels do not end with ';'")
    if not labels.isprintable():
        raise RecordError(key, "the labels hold control characters")
