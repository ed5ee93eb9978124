"""Files written whole or not at all, and read only if they are regular.

A name in a folder that others may write to can be planted: a symbolic link that leads to somebody's
file, a FIFO whose reading never returns. Temporary names are random and made exclusively, and no
link is followed at a name that the program itself chooses.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_CREATE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, the opening of a FIFO waits for its other end.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_UPDATE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NotRegular(OSError):
    """What is there is no regular file: a link, a FIFO, a device, a folder."""


def create(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a new file for writing; `FileExistsError` if the name is taken."""
    return os.open(path, os.O_WRONLY | _CREATE, mode)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; `NotRegular` for anything else, without waiting."""
    _refuse_special(path, os.lstat(path))  # before opening, which a device may answer to
    return os.fdopen(_opened(path, _READ), "rb")


def open_to_update(path: Path) -> BinaryIO:
    """Open a regular file that is there for reading and writing, unbuffered; else `NotRegular`."""
    return os.fdopen(_opened(path, _UPDATE), "r+b", buffering=0)


def open_to_append(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file, made if it is not there, for appending; else `NotRegular`."""
    with suppress(FileNotFoundError):
        _refuse_special(path, os.lstat(path))
    return os.fdopen(_opened(path, _APPEND), "ab", buffering)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most`; OSError (EFBIG) for a larger one."""
    with open_regular(path) as file:
        fits = os.fstat(file.fileno()).st_size <= most
        data = file.read(most + 1) if fits else b""
    if not fits or len(data) > most:
        raise OSError(errno.EFBIG, f"{Path(path).name} is larger than {most:,} bytes", str(path))
    return data


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file aside, fsync it, and move it to `path` at once, replacing what is there.

    A killed process leaves `path` as it was, and a file that `remove_unfinished` removes. A link
    is replaced, not followed; `NotRegular` for a folder, a FIFO or a device.
    """
    path = Path(path)
    with suppress(FileNotFoundError):
        if not stat.S_ISLNK((found := os.lstat(path)).st_mode):
            _refuse_special(path, found)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(create(aside), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make `path` and its parents; `NotADirectoryError` that says what is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        found = Path(error.filename)
        what = f"{found} is not a folder"
        if found.is_symlink() and not found.exists():
            what = f"{found} is a symbolic link to {os.readlink(found)}, which does not exist"
        raise NotADirectoryError(errno.ENOTDIR, what, str(found)) from error


def remove_unfinished(path: Path) -> None:
    """Remove what processes killed in `write_whole(path)` have left; none may be in it."""
    for left in Path(path).parent.glob(f".{Path(path).name}.*.tmp"):
        with suppress(OSError):
            left.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise  # those file systems offer no more than the rename
    finally:
        os.close(descriptor)


def _opened(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a FIFO that nobody reads
            name = Path(path).name
            raise NotRegular(errno.EINVAL, f"{name} is not a regular file", str(path)) from error
        raise
    try:
        _refuse_special(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_special(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise NotRegular(errno.EINVAL, f"{Path(path).name} is {kind}", str(path))
