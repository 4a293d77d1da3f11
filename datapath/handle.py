# SPDX-License-Identifier: Apache-2.0
"""One open map, in bytes: single and batched operations, with the fallback for kernels without batches.

Responsible for: owning the descriptor, cutting batches into chunks, and saying which keys failed.
Whether a kernel has batches for a map's type is probed by trying.  Called by: `datapath.maps`.
Safe to use from one thread at a time per operation; the kernel serialises the rest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from datapath import syscall
from datapath.errors import DatapathError, KeyAbsent, MapError, map_error
from datapath.syscall import MapInfo
from datapath.uapi import MapType, Update

CHUNK = 4096  # entries a batch: beyond it the rate no longer grows, and a call stays under 10 ms
_MAX_BUCKET = 1 << 20  # entries of one hash bucket that a scan still makes room for

Entry = tuple[bytes, bytes]


class MapHandle:
    """An open map; `close` it or use it as a context manager.  `is_new`: this process made it."""

    def __init__(self, name: str, fd: int, *, is_new: bool = False) -> None:
        self.name = name
        self.fd = fd
        self.is_new = is_new
        self._batches = True  # until this kernel says otherwise for this type

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @cached_property
    def info(self) -> MapInfo:
        """Type, sizes and flags, asked once: they never change."""
        return syscall.map_info(self.fd)

    @cached_property
    def value_size(self) -> int:
        """Bytes of one value as system calls hand it over: for a per-CPU map the values of all CPUs."""
        if self.info.type in (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY):
            return -(-self.info.value_size // 8) * 8 * possible_cpus()
        return self.info.value_size

    def memory(self) -> int:
        """Return the bytes of kernel memory that the map takes now; 0 where this kernel does not say."""
        with open(f"/proc/self/fdinfo/{self.fd}", encoding="ascii") as lines:
            said = (line.split() for line in lines)
            return next((int(words[1]) for words in said if words[0] == "memlock:"), 0)

    # --- one entry

    def lookup(self, key: bytes) -> bytes | None:
        """Return the value of `key`, or None.  Raises MapError."""
        try:
            return syscall.map_lookup(self.fd, key, self.value_size, self.name)
        except KeyAbsent:
            return None

    def update(self, key: bytes, value: bytes, how: Update = Update.ANY) -> None:
        """Write one entry.  Raises MapFull, KeyExists, KeyAbsent or MapError."""
        syscall.map_update(self.fd, key, value, self.name, how)

    def delete(self, key: bytes) -> bool:
        """Delete one entry; return whether it was there.  Raises MapError."""
        try:
            syscall.map_delete(self.fd, key, self.name)
        except KeyAbsent:
            return False
        return True

    # --- many

    def update_many(self, keys: Sequence[bytes], values: Sequence[bytes]) -> dict[int, DatapathError]:
        """Write all entries; return the errors by position in `keys` (empty: all written)."""
        failed: dict[int, DatapathError] = {}
        for start in range(0, len(keys), CHUNK):
            end = start + CHUNK
            self._update_chunk(keys[start:end], values[start:end], start, failed)
        return failed

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Delete all keys; return how many were there.  Raises MapError."""
        return sum(self._delete_chunk(keys[start : start + CHUNK]) for start in range(0, len(keys), CHUNK))

    def _update_chunk(
        self, keys: Sequence[bytes], values: Sequence[bytes], base: int, failed: dict[int, DatapathError]
    ) -> None:
        at, count = 0, len(keys)
        while self._batches and at < count:
            done, error = syscall.map_update_batch(
                self.fd, b"".join(keys[at:]), b"".join(values[at:]), count - at
            )
            at += done
            if self._lacks_batches(error):
                break
            if error:  # entry `at` is the one refused: go on behind it
                failed[base + at] = map_error(self.name, "update", error)
                at += 1
            if len(failed) > count // 8:  # a full map refuses them all: no use in cutting again
                break
        for position in range(at, count):
            try:
                self.update(keys[position], values[position])
            except MapError as refused:
                failed[base + position] = refused

    def _delete_chunk(self, chunk: Sequence[bytes]) -> int:
        at = deleted = 0
        while self._batches and at < len(chunk):
            rest = chunk[at:]
            done, error = syscall.map_delete_batch(self.fd, b"".join(rest), len(rest))
            at += done
            deleted += done
            if self._lacks_batches(error):
                break
            if error == errno.ENOENT:
                at += 1
            elif error:
                raise map_error(self.name, "delete", error, done=deleted)
        return deleted + sum(self.delete(key) for key in chunk[at:])

    def _lacks_batches(self, error: int) -> bool:
        if error == syscall.NO_BATCHES:
            self._batches = False
        return not self._batches

    # --- reading all

    def items(self) -> Iterator[Entry]:
        """Yield every entry, in chunks; entries written meanwhile may or may not come, none comes twice
        unless it was deleted and written again."""
        for keys, values, count in self.chunks():
            key_size, value_size = self.info.key_size, self.value_size
            for index in range(count):
                yield (
                    keys[index * key_size : (index + 1) * key_size],
                    values[index * value_size : (index + 1) * value_size],
                )

    def keys(self) -> Iterator[bytes]:
        """Yield every key."""
        return (key for key, _ in self.items())

    def count(self) -> int:
        """Count the entries by reading them all."""
        return sum(count for _, _, count in self.chunks())

    def chunks(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield (packed keys, packed values, entries), bounded by what the map can hold."""
        position: bytes | None = None
        size, read = min(CHUNK, self.info.max_entries), 0
        while self._batches and read <= 2 * self.info.max_entries:
            following, keys, values, count, error = syscall.map_lookup_batch(
                self.fd, position, self.info.key_size, self.value_size, size
            )
            if error == errno.ENOSPC and size < _MAX_BUCKET:
                size *= 2
                continue
            if self._lacks_batches(error):
                break
            if error not in (0, errno.ENOENT):
                raise map_error(self.name, "read", error, done=read)
            yield keys, values, count
            if error == errno.ENOENT:
                return
            position, read = following, read + count
        if not self._batches:
            yield from self._one_by_one()

    def _one_by_one(self) -> Iterator[tuple[bytes, bytes, int]]:
        key: bytes | None = None
        for _ in range(2 * self.info.max_entries):
            key = syscall.map_next_key(self.fd, key, self.info.key_size, self.name)
            if key is None:
                return
            value = self.lookup(key)
            if value is not None:
                yield key, value, 1


@cache
def possible_cpus() -> int:
    """Return how many CPUs the kernel makes room for in per-CPU maps."""
    text = Path("/sys/devices/system/cpu/possible").read_text()
    return max(int(part.split("-")[-1]) for part in text.strip().split(",")) + 1
