"""A second SIGTERM or Ctrl-C ends the process at once, whatever its main thread does.

Python runs signal handlers in the main thread, between two of its instructions, and the next one
does not come while that waits in C for a batch, a disk or another process. What the interpreter
does at once is to write the signal's number to a file descriptor: a thread reads it there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from fp8lm.runtime.streams import is_writable

URGENT = (signal.SIGTERM, signal.SIGINT)
# SLURM signals a launcher and its workers, and the launcher passes it on: that is one request.
SAME_REQUEST = 1.0  # seconds


def exit_at_second_signal(end: Callable[[int], object] = os._exit) -> None:
    """From now on call `end` with 128 + n at the second signal of `URGENT`.

    It counts those that Python handles. `end` runs in a thread, so that only `os._exit` does it for
    certain. Call this in the main thread, once.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read, end), name="signals", daemon=True).start()


def _watch(read: int, end: Callable[[int], object]) -> None:
    number = second_signal(_received(read))
    line = f"a second signal ({signal.Signals(number).name}): ended at once\n"
    with suppress(OSError):  # and not through Python's stream, which the main thread may hold
        if is_writable(2, 0.0):
            os.write(2, line.encode())
    end(128 + number)


def _received(read: int) -> Iterable[tuple[int, float]]:
    while True:
        for number in os.read(read, 64):
            yield number, time.monotonic()


def second_signal(received: Iterable[tuple[int, float]]) -> int:
    """The number of the second urgent signal among `received`, numbers and times in seconds."""
    first = None
    for number, when in received:
        if number in URGENT:
            if first is not None and when - first > SAME_REQUEST:
                return number
            first = when if first is None else first
    raise EOFError("no second signal")
