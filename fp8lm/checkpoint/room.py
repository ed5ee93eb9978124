"""Makes room on a full disk: deletes early what retention would delete, never the last valid one.

Old checkpoints normally go once a new one is written. Where there is no room for that one, those go
first that `Retention` would let go of after it, and damaged ones that nothing can be loaded from,
except the newest valid one: it stays until the new one is there. So a disk needs room for two.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fp8lm.checkpoint.collectives import Group, on_main
from fp8lm.checkpoint.files import (
    NO_ROOM,
    Retention,
    anybody_may,
    find_folder,
    remove,
    saved_iterations,
)
from fp8lm.checkpoint.loading import find_checkpoint
from fp8lm.runtime.errors import InputError, LockLost


def make_room(
    root: Path,
    iteration: int,
    retention: Retention,
    group: Group,
    verify_owner: Callable[[], None] = anybody_may,
) -> bool:
    """Delete what may go for checkpoint `iteration`; whether anything did. A collective.

    `verify_owner` raises where another run has taken the folder over: then nothing does.
    """
    if retention == Retention():
        return False
    try:
        valid = find_checkpoint(root, group)
        if valid is None:
            return False
        going = on_main(group, lambda: _may_go(root, iteration, retention, valid.iteration))
        on_main(group, verify_owner)
        on_main(group, lambda: remove(root, going))
    except LockLost:
        raise
    except (InputError, OSError):  # none is known to be valid, or nothing can be deleted
        return False
    return bool(going)


def describe_room(root: Path, error: OSError, retention: Retention) -> str:
    """How much room is there and how much is needed, and what to do; "" for any other error."""
    if error.errno not in NO_ROOM:
        return ""
    needed, free = _newest_bytes(root), _free_bytes(root) if error.errno == errno.ENOSPC else None
    sizes = [f"the last one has {needed:,} bytes"] if needed else []
    sizes += [f"{free:,} are free"] if free is not None else []
    cure = "free some, or save to a larger disk"
    if retention == Retention():
        cure = "free some, set checkpoint.keep_last, or save to a larger disk"
    elif needed:
        cure += ": the newest valid one is never deleted before the next is written"
    return f"; {', '.join(sizes)}; {cure}" if sizes else f"; {cure}"


def _may_go(root: Path, iteration: int, retention: Retention, valid: int) -> list[int]:
    """Which checkpoints in `root` may go for `iteration`; never `valid`, the newest valid one."""
    saved = saved_iterations(root)
    superseded = retention.superseded(sorted({iteration, *saved}, reverse=True), iteration)
    damaged = [old for old in saved if valid < old < iteration and not retention.marks(old)]
    return sorted({*superseded, *damaged} - {valid})


def _newest_bytes(root: Path) -> int | None:
    try:
        folder = find_folder(root, max(saved_iterations(root)))
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder))
    except (OSError, ValueError, TypeError, InputError):  # there is none
        return None


def _free_bytes(root: Path) -> int | None:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return None
