"""A line for whoever watches a terminal while something takes long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fp8lm.runtime.streams import complain

PATIENCE = 3.0  # seconds


@contextmanager
def progress_line(text: str, after: float = PATIENCE) -> Iterator[None]:
    """Print `text` on stderr if the `with` block takes longer than `after` seconds.

    Only to a terminal: a log gains nothing from it.
    """
    timer = threading.Timer(after, complain, [text])
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
