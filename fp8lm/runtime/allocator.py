"""What glibc does with large blocks of memory that were freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 2**20  # bytes
LARGEST = 2**25  # that glibc takes for a block which it may keep


def return_large_blocks() -> None:
    """Have freed blocks of `LARGE` bytes or more go back to the system at once, where glibc is.

    By default glibc keeps blocks of up to 32 MB once some have been freed, and what it keeps is in
    pieces: a process that only ever holds a few can grow to many times their size.
    """
    _set(_M_MMAP_THRESHOLD, LARGE)


def keep_freed_blocks() -> None:
    """Have freed blocks of up to `LARGEST` bytes kept for the next ones, where glibc is.

    A training step on a CPU frees and takes tensors of the same sizes over and over. What goes back
    to the system is cleared by it, page by page, when it is taken again.
    """
    _set(_M_MMAP_THRESHOLD, LARGEST)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set(parameter: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)
