"""The process's memory: keep what a training loop frees and takes again; how much was taken at most; running out."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt` options."""

GROWN = 32 * 2**20
"""Bytes above which glibc takes a block from the system by itself at most: its threshold grows up to here in use."""


class OutOfMemory(RuntimeError):
    """Raised when work takes more memory than the machine or its accelerator gives; says what to make smaller."""


def ran_out(error: Exception) -> bool:
    """Whether an error says that there is no memory left, or that no machine has as much as was asked for.

    Torch and the runtimes have no errors of their own kind for it.
    """
    said = "out of memory|allocate memory|enough memory|[Ss]torage size calculation overflow"
    return isinstance(error, MemoryError) or bool(re.search(said, str(error)))


@contextmanager
def enough_memory(work: object, settings: Mapping[str, object]) -> Iterator[None]:
    """Turn running out of memory inside the `with` into `OutOfMemory`, which names `settings` and their values.

    Systems that promise more than they have (Linux does) may end the process instead when it takes what was promised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        asked = re.search(r"allocate (\d[\d.]* ?[KMGTPE]?i?B(?:ytes)?)", str(error), re.IGNORECASE)
        given = ", ".join(f"{name} = {value}" for name, value in settings.items())
        raise OutOfMemory(
            f"{work}: out of memory{f' for {asked[1]} more' if asked else ''} with {given}. Make one of these smaller, "
            f"in a new run folder."
        ) from error


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library keep large blocks that are freed, inside the `with`, and give them back at its end.

    glibc returns a freed block of megabytes to the system at once, and the next one of its size is cleared page by page
    as it is first written. On a CPU that takes a tenth of a training step, and of detection up to a half on virtual
    machines, whose system returns pages further, to its host. Elsewhere than in glibc nothing happens.
    """
    keep_memory()
    try:
        yield
    finally:
        if libc := _glibc():
            libc.mallopt(MMAP_THRESHOLD, GROWN)
            libc.mallopt(TRIM_THRESHOLD, 2 * GROWN)
            libc.malloc_trim(0)


def keep_memory() -> None:
    """Let the C library keep large blocks that are freed, for as long as the process lives."""
    if libc := _glibc():
        libc.mallopt(MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never: a step of S at 1024×1024 frees and takes more than any int could say


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def peak_memory() -> int:
    """Return the most bytes of memory that the process has held so far; 0 on systems that do not tell."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
