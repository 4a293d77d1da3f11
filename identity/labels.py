# SPDX-License-Identifier: Apache-2.0
"""Labels, and the one text form of a set of them that etcd keys are made of.

A label is ``source:key=value``.  A set of labels is serialized sorted by key, each label followed by
``;`` and the ``=`` kept for an empty value::

    container:app=web;container:env=prod;reserved:init=;

That text *is* the identity for every agent of the cluster, so whatever could forge another label in
it is refused here: ``;``, everything that is not printable, ``=`` in a key, and two labels of one key
(Cilium keeps one label a key, whatever its source).

Called by everything that handles identities; pure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from operator import lt

import msgspec

from core.errors import shorten
from identity.errors import LabelError

# Sources as Cilium names them.
UNSPEC = "unspec"
ANY = "any"
K8S = "k8s"
CONTAINER = "container"
RESERVED = "reserved"
CIDR = "cidr"
GENERATED = "cilium-generated"

# Keys of labels that name a port of the workload (`policy.names`): holdfast.port.http=8080.
PORT_PREFIX = "holdfast.port."

# Limits in characters.  Kubernetes allows keys of 317 and values of 63; docker sets none.  The text
# limit keeps an etcd key far below etcd's request limit of 1.5 MiB, and a joiner's listing small.
MAX_SOURCE = 64
MAX_KEY = 512
MAX_VALUE = 2048
# The labels of an IPv6 address are its 129 prefixes and reserved:world.
MAX_LABELS = 160
MAX_TEXT = 16_384

_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


class Label(msgspec.Struct, frozen=True, order=True, gc=False):
    """One label, checked when built by `label` or `parse_label`; its text is ``source:key=value``."""

    source: str
    key: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.key}={self.value}"


def label(source: str, key: str, value: str = "") -> Label:
    """Return the label of three checked parts; LabelError says which part is wrong, and why."""
    _check_source(source, key)
    _check_part("key", key, MAX_KEY, source, key)
    _check_part("value", value, MAX_VALUE, source, key)
    if not key:
        raise LabelError(f"label {shorten(f'{source}:={value}')} has no key", hint="write source:key=value")
    if "=" in key:
        raise LabelError(f"the key of label {shorten(f'{source}:{key}')} contains '='", hint="rename it")
    return Label(source, key, value)


def parse_label(text: str, *, default_source: str = UNSPEC) -> Label:
    """Parse ``[source:]key[=value]``; a ``:`` behind the first ``=`` belongs to the value.

    Raises LabelError.  ``$name`` is Cilium's short form of ``reserved:name``.
    """
    if text.startswith("$"):
        text = f"{RESERVED}:{text[1:]}"
    name, _, value = text.partition("=")
    source, colon, key = name.partition(":")
    return label(source, key, value) if colon else label(default_source, name, value)


class Labels:
    """An immutable, hashable set of labels with one label a key, iterated sorted by key.

    `serialized` is the text of the whole set and decides equality.  Build one by `of` or `parse`.
    """

    __slots__ = ("_labels", "serialized")

    serialized: str

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        self._labels: tuple[Label, ...] = tuple(sorted(set(labels), key=_by_key))
        self.serialized = "".join([f"{each};" for each in self._labels])
        self._check()

    @classmethod
    def of(cls, labels: Mapping[str, str] | Iterable[Label | str], *, source: str = CONTAINER) -> Labels:
        """Build from ``{key: value}`` of one `source`, or from labels and ``source:key=value`` texts.

        Raises LabelError.
        """
        if isinstance(labels, Mapping):
            return cls(label(source, key, value) for key, value in labels.items())
        return cls(
            each if isinstance(each, Label) else parse_label(each, default_source=source) for each in labels
        )

    @classmethod
    def parse(cls, text: str) -> Labels:
        """Parse the serialized form.  The order is not checked: compare `serialized` where it matters.

        Raises LabelError for a text without its last ``;``, with empty parts, or with a bad label.
        """
        if len(text) > MAX_TEXT:
            raise LabelError(f"labels {shorten(text)} are longer than {MAX_TEXT} characters")
        if not text:
            return EMPTY
        if not text.endswith(";"):
            raise LabelError(f"labels {shorten(text)} do not end with ';'")
        parts = [_parse_cached(part) for part in text[:-1].split(";")]
        labels = tuple([label for label, _ in parts])
        if (
            len(parts) <= MAX_LABELS
            and text == "".join([written for _, written in parts])
            and _ordered(labels)
        ):
            # As it nearly always is: 64 000 identities are read without sorting and writing their labels.
            return cls._serialized(labels, text)
        return cls(labels)

    @classmethod
    def _serialized(cls, labels: tuple[Label, ...], text: str) -> Labels:
        """Build from labels that are a set already, in order, with their text."""
        made = cls.__new__(cls)
        made._labels, made.serialized = labels, text
        return made

    def get(self, source: str, key: str) -> str | None:
        """Return the value of one label; `source` ``any`` matches every source."""
        for each in self._labels:
            if each.key == key and source in (each.source, ANY):
                return each.value
        return None

    def union(self, other: Iterable[Label]) -> Labels:
        """Return both sets together; LabelError when they give one key different sources or values."""
        return Labels((*self._labels, *other))

    def texts(self) -> list[str]:
        """Return the labels as people read them: ``source:key=value``, without ``=`` for no value."""
        return [str(each).removesuffix("=") if not each.value else str(each) for each in self._labels]

    def __iter__(self) -> Iterator[Label]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __contains__(self, item: object) -> bool:
        return item in self._labels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self.serialized == other.serialized

    def __hash__(self) -> int:
        return hash(self.serialized)

    def __repr__(self) -> str:
        return f"Labels({self.serialized!r})"

    def _check(self) -> None:
        if len(self._labels) > MAX_LABELS:
            raise LabelError(
                f"{len(self._labels)} labels are more than the {MAX_LABELS} an identity may have"
            )
        if len(self.serialized) > MAX_TEXT:
            raise LabelError(
                f"labels {shorten(self.serialized)} are longer than {MAX_TEXT} characters together"
            )
        for left, right in zip(self._labels, self._labels[1:], strict=False):
            if left.key == right.key:
                raise LabelError(
                    f"labels {shorten(str(left))} and {shorten(str(right))} have the same key",
                    hint="an identity holds one label a key, whatever its source; rename one",
                )


def _by_key(item: Label) -> tuple[str, str, str]:
    return item.key, item.source, item.value


def _ordered(labels: tuple[Label, ...]) -> bool:
    """True if no key comes twice or before a lower one."""
    keys = [each.key for each in labels]
    return all(map(lt, keys, keys[1:]))


# 64 000 identities share few label texts; without the cache each record would hold copies of its own.
@functools.lru_cache(maxsize=16_384)
def _parse_cached(text: str) -> tuple[Label, str]:
    """Return the label of one part, and how it is written in a set."""
    if ":" not in text.partition("=")[0]:
        raise LabelError(f"label {shorten(text)} has no source", hint="write source:key=value")
    found = parse_label(text)
    return found, f"{found};"


def _check_source(source: str, key: str) -> None:
    if len(source) > MAX_SOURCE or not _SOURCE.match(source):
        raise LabelError(
            f"source {shorten(source)} of label {shorten(key)} is not a name of at most {MAX_SOURCE} "
            "letters, digits, '.', '_' or '-'",
            hint=f"for example {CONTAINER} or {K8S}",
        )


def _check_part(part: str, text: str, limit: int, source: str, key: str) -> None:
    if len(text) > limit:
        raise LabelError(
            f"the {part} of label {shorten(f'{source}:{key}')} is longer than {limit} characters"
        )
    if ";" in text or not text.isprintable():
        raise LabelError(
            f"the {part} of label {shorten(f'{source}:{key}')} is {shorten(text)}, with ';' or a character "
            "that can not be printed",
            hint="such a label could pass for another one; change it",
        )


EMPTY = Labels()
