"""Child processes that end with their parent, even if it was killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "FP8LM_PARENT"  # environment variable: the process whose children are tied to it
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> None:
    """On Linux, be killed when the thread that forked this process ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tie_children(environment: dict[str, str] | os._Environ) -> None:
    """Let the children of this process that get `environment` tie themselves to it.

    They have to be started by the main thread: Linux counts the end of the thread that forked.
    """
    environment[PARENT] = str(os.getpid())


def tie_to_parent() -> None:
    """On Linux, be killed when the process that started this one ends, if that wants it.

    It does nothing in a process that has been started by another one in between.
    """
    parent = os.environ.get(PARENT, "")
    if not parent.isdecimal() or not sys.platform.startswith("linux"):
        return
    if os.getppid() == int(parent):
        end_with_parent()
    # It may have ended before: then nothing tells, and another process has taken this one over.
    if not _lives(int(parent)):
        os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
