"""Best-effort output: a full disk or a lost reader must not end a command's work."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

WAIT = 5.0  # seconds for a terminal or a reader that has stopped
_CHUNK = 4096  # bytes that a pipe takes without waiting once it takes any (PIPE_BUF on Linux)


class BestEffortStream:
    """Text for `stream`: a write that fails, or would wait for long, is given up.

    Each piece of text that is given up goes to `lost`, with the reason. Later ones are tried again,
    without waiting where the one before had to. Written past the stream's buffer, in which the text
    would stay and make Python's own end fail.
    """

    def __init__(
        self,
        stream: TextIO | None,
        lost: Callable[[str, str], object] = lambda text, reason: None,
        wait: float = WAIT,
    ) -> None:
        self._stream, self._lost, self._wait = stream, lost, wait
        self._patience = wait
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text`, or give it up."""
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, "closed")
            self._write(self._stream, text)
            self._patience = self._wait
        except TimeoutError:
            self._patience = 0.0
            self._lost(text, "nobody reads it")
        except (OSError, ValueError) as error:  # ValueError: a closed stream
            self._lost(text, getattr(error, "strerror", None) or str(error))
        return len(text)

    def flush(self) -> None:
        """Nothing: `write` is complete."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """The stream's; OSError if it has none."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            file = stream.fileno()
        except (OSError, ValueError, AttributeError):  # in memory
            stream.write(text)
            stream.flush()
            return
        stream.flush()
        data = text.encode(self.encoding, "backslashreplace")
        while data:
            if not is_writable(file, self._patience):
                raise TimeoutError
            data = data[os.write(file, data[:_CHUNK]) :]


def is_writable(file: int, wait: float) -> bool:
    """Whether a write to `file` would not wait, or fails at once, within `wait` seconds."""
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return bool(poll.poll(1000.0 * wait))


def say(line: str) -> None:
    """Print one line on stdout."""
    BestEffortStream(sys.stdout).write(f"{line}\n")


def complain(line: str) -> None:
    """Print one line on stderr."""
    BestEffortStream(sys.stderr).write(f"{line}\n")


def warn(text: str) -> None:
    """Print a warning, as one line on stderr."""
    complain(f" warning: {' '.join(text.split())}")


def open_missing_streams() -> None:
    """Open /dev/null as stdin, stdout or stderr where the caller has closed them.

    Otherwise the next files to be opened get their numbers, and whatever C libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
