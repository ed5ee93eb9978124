"""The file operations of a run lock, atomic on file systems that machines share (NFS).

create    a complete file appears under its name, or another one was there before
beat      overwrites the record in place, in the file that has our token: a file that has taken its
          name meanwhile is never touched
remove    moves the file to a name of our own first, looks what it is, and puts back another's

Whatever stands under the name is read with bounds, and links are not followed.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fp8lm.runtime.files import create, open_regular, open_to_update
from fp8lm.runtime.holder import Holder

NAME = "run.lock"
_MOST_BYTES = 1 << 14
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Seen:
    """A lock file: its record (None: unreadable as one), and what every heartbeat changes."""

    holder: Holder | None
    file: tuple[int, int]
    mark: tuple[bytes, int]

    def is_of(self, token: str, file: tuple[int, int] | None = None) -> bool:
        """Whether it is the lock with `token`, or `file` where a full disk left it empty."""
        if self.holder is None:
            return self.file == file
        return self.holder.token == token


def read_lock(path: Path) -> Seen | None:
    """What stands at `path`, None if nothing; `NotRegular` if it can be no lock."""
    try:
        with open_regular(path) as file:
            return _read(file)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # stale: replaced while it was opened
            return None
        raise


def create_lock(path: Path, holder: Holder) -> tuple[int, int] | None:
    """Make the lock of `holder`; which file it is, None if there is a lock.

    On a full disk it may be empty: the next heartbeat tries to write it. OSError if it can't be.
    """
    aside = _aside(path)
    try:
        file = _write_new(aside, holder)
        try:
            os.link(aside, path, follow_symlinks=False)
            return file
        except FileNotFoundError:  # another has taken it for what a killed process left
            return None
        except FileExistsError:
            # Over NFS a repeated request may find its own success.
            seen = read_lock(path)
            return file if seen is not None and seen.file == file else None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        with suppress(FileExistsError):  # for a moment it is there and empty
            return _write_new(path, holder)
        return None
    finally:
        with suppress(OSError):
            os.unlink(aside)


def write_heartbeat(path: Path, holder: Holder, file: tuple[int, int] | None) -> Seen | None:
    """Write `holder` into its own lock, which it made as `file`; what was there, None if nothing.

    Another's lock is left alone. A full disk keeps the record as it is, and its time is new.
    """
    try:
        with open_to_update(path) as lock:
            seen = _read(lock)
            if seen.is_of(holder.token, file):
                os.utime(lock.fileno())  # needs no space on the disk
                _write(lock.fileno(), holder)
            return seen
    except FileNotFoundError:
        return None


def remove_lock(path: Path, expected: Callable[[Seen], bool]) -> bool:
    """Remove the lock if it is the `expected` one; whether it was. OSError if it can't be.

    Of two that remove one lock, one does.
    """
    aside = _aside(path)
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    seen = None
    with suppress(OSError):
        seen = read_lock(aside)
    removed = seen is not None and expected(seen)
    if not removed:
        _put_back(aside, path)
    with suppress(FileNotFoundError):  # a new holder clears up
        os.unlink(aside)
    return removed


def leftovers(path: Path) -> list[Path]:
    """Files of locks that are being made or removed, or that killed processes left."""
    return list(path.parent.glob(f".{NAME}.*"))


def _read(file: BinaryIO) -> Seen:
    facts, content = os.fstat(file.fileno()), file.read(_MOST_BYTES)
    holder = None
    with suppress(ValueError):
        holder = Holder.model_validate_json(content)
    mark = content if holder is not None else b"", facts.st_mtime_ns
    return Seen(holder, (facts.st_dev, facts.st_ino), mark)


def _write_new(path: Path, holder: Holder) -> tuple[int, int]:
    descriptor = create(path)
    try:
        _write(descriptor, holder)
        facts = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return facts.st_dev, facts.st_ino


def _write(descriptor: int, holder: Holder) -> None:
    try:
        os.pwrite(descriptor, holder.to_bytes(), 0)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FULL:
            raise


def _put_back(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path, follow_symlinks=False)
    except (FileExistsError, FileNotFoundError):
        pass  # its holder has noticed that it was missing, or another one holds the lock now
    except OSError:  # no links on this file system
        if not os.path.lexists(path):
            os.rename(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")
