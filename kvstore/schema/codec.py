# SPDX-License-Identifier: Apache-2.0
"""JSON records: exact when written, tolerant when read, kept whole when rewritten.

Exact is what Go's encoding/json writes: declared field order, no blanks, `<`, `>`, `&` and the two
Unicode line separators escaped.  Tolerant: unknown fields are skipped, missing ones have their zero,
`null` counts as missing; a wrong type is an error that names the field.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from core.errors import shorten
from kvstore.errors import RecordError

T = TypeVar("T", bound=msgspec.Struct)

# Records of state are a few hundred bytes; a node with many labels has a few KiB.
MAX_RECORD = 64 * 1024

_encoder = msgspec.json.Encoder()
# None of these can stand outside a string in JSON, so replacing bytes is exact.
_GO_ESCAPES = (
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)


def encode(record: msgspec.Struct) -> bytes:
    """Return the record as Go would write it."""
    return _as_go(_encoder.encode(record))


def _as_go(text: bytes) -> bytes:
    for plain, escaped in _GO_ESCAPES:
        if plain in text:
            text = text.replace(plain, escaped)
    return text


def decode(decoder: msgspec.json.Decoder[T], key: str, value: bytes, *, limit: int = MAX_RECORD) -> T:
    """Return the record in `value`; RecordError says what of it can not be used."""
    if len(value) > limit:
        check_size(key, value, limit)
    try:
        return decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_leniently(decoder, key, value)


def _decode_leniently(decoder: msgspec.json.Decoder[T], key: str, value: bytes) -> T:
    """Try once more without the fields that are null: Go reads them as absent."""
    try:
        fields = msgspec.json.decode(value)
        if isinstance(fields, dict):
            fields = {name: each for name, each in fields.items() if each is not None}
        return msgspec.convert(fields, decoder.type)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(key, f"{error}, in {shorten(value, 80)}") from error


def rewrite(record: msgspec.Struct, old: bytes | None) -> bytes:
    """Return `record` as JSON, followed by the fields of `old` that its type does not know.

    A newer writer's fields then survive us.  Garbage in `old` is replaced.
    """
    text = encode(record)
    unknown = unknown_fields(record, old) if old else {}
    if not unknown:
        return text
    return text[:-1] + b"," + _as_go(_encoder.encode(unknown))[1:]


def unknown_fields(record: msgspec.Struct, old: bytes) -> dict[str, msgspec.Raw]:
    """Return the fields of `old` that the type of `record` does not know; none for what is no JSON object."""
    try:
        fields = msgspec.json.decode(old, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    known = {field.encode_name for field in msgspec.structs.fields(record)}
    return {name: raw for name, raw in fields.items() if name not in known}


def check_size(key: str, value: bytes, limit: int = MAX_RECORD) -> None:
    if len(value) > limit:
        raise RecordError(key, f"its {len(value)} bytes are more than the limit of {limit}", kind="size")


def text_of(key: str, value: bytes, *, limit: int = MAX_RECORD) -> str:
    """Return a value that is plain text; RecordError when it is not UTF-8 or too long."""
    check_size(key, value, limit)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(key, f"is not UTF-8 at byte {error.start}") from error
