"""Standard output of a command whose reader may leave (`| head`), or that may not be writable."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from typing import TextIO

EXIT_UNREAD = 141  # as a shell has it: 128 and SIGPIPE


def show(text: str) -> None:
    """Print the output of a command, whose reader may stop early (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        if not nobody_reads():
            raise


def finish_output() -> str | None:
    """Flush standard output; returns the reason if that fails.

    A reader that has left does not want it, which is no failure. Python would try again at its end,
    and complain there.
    """
    if sys.stdout is None:  # closed before this process began
        return None
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        return f"standard output cannot be written: {error.strerror}"
    return None


def nobody_reads() -> bool:
    """Whether the reader of stdout or stderr has left; what is written there goes nowhere then."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if stream and _is_unread(stream)]
    for stream in unread:
        _discard(stream)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # an error is told of in any case
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _discard(stream: TextIO) -> None:
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
