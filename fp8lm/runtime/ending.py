"""How the process of a command ends: with its exit code, or at once at a second signal.

Python runs signal handlers in the main thread, between two of its instructions, and the next one
does not come while that waits in C for a batch, a disk or another process. What the interpreter
does at once is to write the signal's number to a file descriptor: a thread reads it there, so that
a second SIGTERM or Ctrl-C ends the process whatever its main thread does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn

from fp8lm.runtime.errors import EXIT_FAILED, run_command
from fp8lm.runtime.streams import is_writable

URGENT = (signal.SIGTERM, signal.SIGINT)
# SLURM signals a launcher and its workers, and the launcher passes it on: that is one request.
SAME_REQUEST = 1.0  # seconds


def exit_with(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `main` as a command (see `run_command`), and end this process with its exit code.

    A process that failed beside others still has its process groups. It ends without destroying
    them: NCCL waits there for the other ranks, which wait for this one in a collective, and the
    launcher could not start the job again before their timeout.
    """
    try:
        code = run_command(main)
    except Exception:
        with suppress(OSError, ValueError):
            traceback.print_exc()
        code = EXIT_FAILED
    if not _has_groups():
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _has_groups() -> bool:
    distributed = sys.modules.get("torch.distributed")  # a command may not have come to import it
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


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
