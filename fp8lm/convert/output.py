"""The folder of a conversion: not there until all of it is, and continued where it was killed.

.NAME.converting/                  what is done so far, beside OUTPUT
.NAME.converting/conversion.json   which conversion: source, options, version
.NAME.converting/run.lock          while a process writes it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fp8lm.checkpoint.files import NO_ROOM
from fp8lm.runtime.errors import FolderInUse, InputError, RunFailed
from fp8lm.runtime.files import sync_folder, write_whole
from fp8lm.runtime.lock_file import NAME as LOCK
from fp8lm.runtime.run_lock import RunFolder, RunLocks

JOURNAL = "conversion.json"
_UNFINISHED = ".converting"


def check_output(output: Path) -> None:
    """`InputError` where something is at `output` already."""
    if os.path.lexists(output):
        raise InputError(f"--output {output} is there already: name a folder that is not")


def identity_of_files(source: Path) -> str:
    """A digest of the names, sizes and times of a model's files: of changed ones it is another."""
    found = [source]
    if source.is_dir():
        found = [p for p in sorted(source.rglob("*")) if _UNFINISHED not in str(p.parent)]
    stats = [(str(path), path.stat()) for path in found if path.is_file()]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@contextmanager
def conversion_folder(output: Path, conversion: Mapping[str, Any]) -> Iterator[Path]:
    """The folder to write in, which gets the name `output` at the end; an error leaves it.

    What the same `conversion` has left in it is kept. `InputError` while another process writes it.
    """
    check_output(output)
    work = output.with_name(f".{output.name}{_UNFINISHED}")
    complaint = f"--output {output} cannot be written"
    try:
        in_the_way = work.is_symlink() or (work.exists() and not _is_ours(work))
    except OSError as error:
        raise InputError(f"{complaint}: {error.strerror}") from error
    if in_the_way:
        raise InputError(f"{work} is in the way: no conversion has left it")
    locks = RunLocks()
    try:
        locks.take([RunFolder(str(work), f"--output {output}", complaint)])
    except FolderInUse as error:
        raise InputError(str(error)) from error
    try:
        check_output(output)  # a conversion that has finished since
        _begin(work, json.dumps(conversion, indent=1, sort_keys=True) + "\n")
        yield work
        check_output(output)
        locks.verify()
    except BaseException as error:
        locks.release()
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise RunFailed(
                f"{complaint}: {error.strerror}; what is done is in {work}: make room, and the "
                "same command goes on"
            ) from error
        raise
    (work / JOURNAL).unlink()
    sync_folder(work)
    locks.release()
    work.rename(output)
    sync_folder(output.parent)


def _is_ours(work: Path) -> bool:
    names = os.listdir(work)
    return JOURNAL in names or all(name.startswith(LOCK) or LOCK in name for name in names)


def _begin(work: Path, conversion: str) -> None:
    """Remove what another conversion has left, and say which this is."""
    journal = work / JOURNAL
    if journal.is_file() and journal.read_text() == conversion:
        return
    for left in work.iterdir():
        if LOCK not in left.name:
            left.unlink() if left.is_symlink() or not left.is_dir() else shutil.rmtree(left)
    write_whole(journal, conversion)
