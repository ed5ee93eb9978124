"""Writing files aside, under another name, before they take their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import write_whole


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A temporary folder on `target`'s file system, removed on leaving the block.

    Write into it, then `os.replace` the finished files to their names: a failure or an interrupt
    leaves nothing. Creates `target`'s parent; raises `InputError` where it cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    except OSError as err:
        raise InputError(f"cannot write to {target.parent}: {err.strerror or err}") from None
    with aside as name:
        yield Path(name)


def write_aside(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write what a user has named as output: at once, and whole or not at all.

    Creates its folder; raises `InputError` where it cannot be written. A device or a pipe, such as
    /dev/stdout, is written to as it is.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"cannot write to {path.parent}: {err.strerror or err}") from None
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                stream.write(data.encode() if isinstance(data, str) else data)
        else:
            write_whole(path, data)
    except OSError as err:
        raise InputError(f"cannot write {path}: {err.strerror or err}") from None
