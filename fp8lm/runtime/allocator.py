"""Keeps a process that handles large blocks of memory one after the other from growing."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 2**20  # bytes


def return_large_blocks() -> None:
    """Have freed blocks of `LARGE` bytes or more go back to the system at once, where glibc is.

    By default glibc keeps blocks of up to 32 MB once some have been freed, and what it keeps is in
    pieces: a process that only ever holds a few can grow to many times their size.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)
