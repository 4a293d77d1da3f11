# SPDX-License-Identifier: Apache-2.0
"""libbpf.so.1 by ctypes: exactly the functions that the loader uses, one typed method each.

Responsible for: declaring signatures, turning NULL and negative results into LoadError, and collecting
what libbpf says into that error.  libbpf's print function is one per process: it is silent except while a
failed step is being repeated to hear why (`explain`).  Every call releases the interpreter's lock.

Called by: `datapath.loader` and `datapath.testrun`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from datapath.errors import LoadError

_SONAME = "libbpf.so.1"
_LOG_TAIL = 30  # lines of libbpf's and the verifier's words that an error shows
_DEBUG = 2  # libbpf's level of chatter, never collected

Pointer = ctypes.c_void_p
_PrintFunction = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

# name: (result, arguments).  "o" is an opaque pointer, "s" a string, "i" an int, "u" an u32, "z" a size_t.
_SIGNATURES = {
    "libbpf_set_print": ("o", "o"),
    "libbpf_probe_bpf_helper": ("i", "iio"),
    "bpf_object__open_mem": ("o", "ozo"),
    "bpf_object__load": ("i", "o"),
    "bpf_object__close": ("", "o"),
    "bpf_object__btf": ("o", "o"),
    "bpf_object__next_map": ("o", "oo"),
    "bpf_object__next_program": ("o", "oo"),
    "bpf_object__find_map_by_name": ("o", "os"),
    "bpf_map__name": ("s", "o"),
    "bpf_map__type": ("u", "o"),
    "bpf_map__key_size": ("u", "o"),
    "bpf_map__value_size": ("u", "o"),
    "bpf_map__is_internal": ("b", "o"),
    "bpf_map__fd": ("i", "o"),
    "bpf_map__reuse_fd": ("i", "oi"),
    "bpf_map__set_initial_value": ("i", "ooz"),
    "bpf_program__name": ("s", "o"),
    "bpf_program__fd": ("i", "o"),
    "bpf_prog_load": ("i", "issozo"),
    "bpf_prog_test_run_opts": ("i", "io"),
    "btf__find_by_name_kind": ("i", "osu"),
    "btf__type_by_id": ("o", "ou"),
    "btf__name_by_offset": ("s", "ou"),
}
_TYPES: dict[str, Any] = {
    "": None,
    "o": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "i": ctypes.c_int,
    "u": ctypes.c_uint32,
    "b": ctypes.c_bool,
    "z": ctypes.c_size_t,
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded, silent library.  Raises LoadError when it is not installed."""
    try:
        lib = ctypes.CDLL(_SONAME, use_errno=True)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype = _TYPES[result]
            function.argtypes = [_TYPES[code] for code in arguments]
    except (OSError, AttributeError) as error:
        raise LoadError(f"{_SONAME}: {error}", hint="install libbpf 1.0 or newer") from error
    lib.libbpf_set_print(None)
    return lib


_explaining = threading.Lock()


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what libbpf says to this thread; others stay silent, and all are afterwards."""
    lines: list[str] = []
    libc, me = ctypes.CDLL(None), threading.get_ident()
    libc.vasprintf.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    libc.free.argtypes = [ctypes.c_void_p]

    def hear(level: int, text: bytes, arguments: int | None) -> int:
        if level >= _DEBUG or threading.get_ident() != me:
            return 0
        formatted = ctypes.c_void_p()
        if libc.vasprintf(ctypes.byref(formatted), text, arguments) >= 0:
            words = ctypes.cast(formatted, ctypes.c_char_p).value or b""
            lines.extend(words.decode(errors="replace").splitlines())
            libc.free(formatted)
        return 0

    callback = _PrintFunction(hear)  # must outlive its registration
    with _explaining:
        library().libbpf_set_print(ctypes.cast(callback, ctypes.c_void_p))
        try:
            yield lines
        finally:
            library().libbpf_set_print(None)


def explain(what: str, step: Callable[[], object], error: OSError) -> LoadError:
    """Repeat a failed step with open ears and return the error that tells its story.

    Most failures are the verifier's, whose log exists only when somebody listens; listening on the way
    of success would cost a tenth of a load.
    """
    with _heard() as lines, contextlib.suppress(OSError):
        step()
    tail = "\n".join(line for line in lines[-_LOG_TAIL:] if line.strip())
    return LoadError(f"{what}: {os.strerror(error.errno or 0)}" + (f"\n{tail}" if tail else ""))


def checked(result: int) -> int:
    """Return a result of libbpf that is not negative.  Raises OSError with its errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def opened(pointer: int | None) -> int:
    """Return a pointer that is not NULL.  Raises OSError with errno."""
    if not pointer:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return pointer


def has_helper(program_type: int, helper: int) -> bool:
    """Return whether this kernel offers a BPF helper to programs of a type, found out by trying."""
    return bool(library().libbpf_probe_bpf_helper(program_type, helper, None) == 1)
