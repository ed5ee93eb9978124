"""Layout of a folder of checkpoints, and atomic publishing, replacing and deleting in it.

ROOT/latest_checkpointed_iteration.txt   the iteration to resume from, written last
ROOT/iter_0000100/                       a checkpoint: .metadata, __R_W.distcp, common.json, the
                                         tokenizer's files, checksums.sha256
ROOT/.iter_0000100.*.tmp/                one being written
ROOT/.iter_0000100.old/                  one being replaced by another of the same iteration
ROOT/.iter_0000100.*.removed/            one being deleted
ROOT/set_aside/iter_0000100/             newer than the one resumed; this run does not touch it
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fp8lm.checkpoint.checksums import CHECKSUMS, checksums_text, data_digest
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import (
    make_folder,
    read_regular,
    remove_unfinished,
    sync_folder,
    write_whole,
)

LATEST = "latest_checkpointed_iteration.txt"
COMMON = "common.json"
LARGEST_LATEST = 4096  # bytes
SET_ASIDE = "set_aside"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FOLDER = re.compile(r"iter_([0-9]{7,18})|\.iter_([0-9]{7,18})\.old")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `keep_last`, and those of every `interval`-th iteration.

    None for both: all stay. With an `interval` alone, the last one stays too.
    """

    keep_last: int | None = None
    interval: int | None = None

    def superseded(self, iterations: list[int], latest: int) -> list[int]:
        """Those of `iterations` (newest first) that go once `latest` is written; no newer ones."""
        if self.keep_last is None and self.interval is None:
            return []
        older = [i for i in iterations if i <= latest][self.keep_last or 1 :]
        return [i for i in older if not self.marks(i)]

    def marks(self, iteration: int) -> bool:
        """Whether `iteration` is one of the `interval`, which stay for good."""
        return self.interval is not None and iteration % self.interval == 0


def anybody_may() -> None:
    """The owner of a folder need not be verified where nobody else is expected to write."""


def latest_iteration(root: str | os.PathLike[str]) -> int | None:
    """The iteration that the latest file names, None if there is no such file.

    Raises `InputError` if the file is unreadable or names none.
    """
    path = Path(root) / LATEST
    try:
        text = read_regular(path, LARGEST_LATEST).decode().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is unreadable: {error}") from error
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InputError(f"{path}: expected the number of an iteration, found {text[:40]!r}")
    return int(text)


def saved_iterations(root: Path) -> list[int]:
    """Iterations of the folders under `root` that are named as checkpoints, newest first.

    A process killed while it replaced a checkpoint may have left only the one set aside.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot look for checkpoints in {root}: {error}") from error
    found = filter(None, map(_FOLDER.fullmatch, names))
    return sorted({int(match[1] or match[2]) for match in found}, reverse=True)


def find_folder(root: Path, iteration: int) -> Path | None:
    """The folder of checkpoint `iteration`, or the one it was to replace; None if there is none."""
    try:
        for folder in (_folder(root, iteration), _aside(root, iteration, "old")):
            if folder.is_dir():
                return folder
    except OSError as error:
        raise InputError(f"cannot look for checkpoints in {root}: {error}") from error
    return None


def make_save_folder(root: Path) -> None:
    """Make `root` and remove what killed processes left in it; `OSError` if not writable."""
    make_folder(root)
    if os.statvfs(root).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(root))
    effective = os.access in os.supports_effective_ids
    if not os.access(root, os.W_OK | os.X_OK, effective_ids=effective):
        raise PermissionError(errno.EACCES, "no permission to write in it", str(root))
    remove_unfinished_saves(root)


def start_writing(root: Path, iteration: int) -> Path:
    """Make the empty folder that the checkpoint is first written to.

    Its name is new: ranks of a run that is taken for dead may still write to that of theirs.
    """
    make_save_folder(root)
    folder = _aside(root, iteration, f"{secrets.token_hex(8)}.tmp")
    folder.mkdir()
    return folder


def publish(
    written: Path,
    iteration: int,
    digests: Mapping[str, str],
    files: Mapping[str, bytes],
    verify_owner: Callable[[], None],
) -> Path:
    """Add `files` to the checkpoint in `written`, name it, then let the latest file name it.

    `digests`: of the files that are in the folder already, by name. `FileNotFoundError` if one of
    them is not: a process has written it elsewhere. `verify_owner` raises if the name is not this
    process's to give any more.
    """
    root = written.parent
    folder = _folder(root, iteration)
    for name in digests:
        if not (written / name).is_file():
            raise FileNotFoundError(f"{written / name}, which a process has written, is not there")
    for name, content in files.items():
        write_whole(written / name, content)
    digests = {**digests, **{name: data_digest(content) for name, content in files.items()}}
    write_whole(written / CHECKSUMS, checksums_text(digests))
    verify_owner()
    if os.path.lexists(folder):
        folder.rename(_aside(root, iteration, "old"))
    written.rename(folder)
    sync_folder(root)
    write_latest(root, iteration)
    remove_unfinished_saves(root)
    return folder


def write_latest(root: Path, iteration: int) -> None:
    """Name `iteration` in the latest file."""
    write_whole(root / LATEST, f"{iteration}\n")


def remove(root: Path, iterations: list[int]) -> None:
    """Delete checkpoints; one that is deleted in part is no longer named as one."""
    for iteration in iterations:
        for folder in (_folder(root, iteration), _aside(root, iteration, "old")):
            if os.path.lexists(folder):
                # A name of its own: one that could not be deleted may still be in the way.
                removed = _aside(root, iteration, f"{secrets.token_hex(8)}.removed")
                try:
                    folder = folder.rename(removed)
                except OSError as error:
                    if error.errno not in NO_ROOM:  # not even for a name, on some full disks
                        raise
                _delete(folder)


def delete_after(root: Path, iteration: int) -> None:
    """Make checkpoint `iteration` the latest, and delete newer ones; 0: none is left."""
    if iteration:
        write_latest(root, iteration)
    else:
        (root / LATEST).unlink(missing_ok=True)
    remove(root, [newer for newer in saved_iterations(root) if newer > iteration])


def quarantine_newer(root: Path, after: int) -> list[int]:
    """Move checkpoints newer than `after` to SET_ASIDE, where nothing reads them; which ones.

    A run that goes on from an older one makes others of the same names, and no rule of its own may
    mix the two.
    """
    iterations = [iteration for iteration in saved_iterations(root) if iteration > after]
    for iteration in iterations:
        _make_own_folder(root / SET_ASIDE)
        name = place = _folder(root / SET_ASIDE, iteration)
        number = 1
        while os.path.lexists(place):
            number += 1
            place = name.with_name(f"{name.name}.{number}")
        _folder(root, iteration).rename(place)
    return iterations


def remove_unfinished_saves(root: Path) -> None:
    """Undo what was begun and not finished; a no-op in a folder where all is well.

    What cannot be deleted stays: its name is none of a checkpoint.
    """
    for replaced in root.glob(".iter_*.old"):
        folder = root / replaced.name[1:].removesuffix(".old")
        if not os.path.lexists(folder):
            replaced.rename(folder)
    remove_unfinished(root / LATEST)
    for suffix in ("old", "tmp", "removed"):
        for left in root.glob(f".iter_*.{suffix}"):
            with suppress(OSError):
                _delete(left)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def _make_own_folder(folder: Path) -> None:
    """Make `folder`; `NotADirectoryError` if its name is a link, which would lead elsewhere."""
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "is a symbolic link", str(folder))


def _folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def _aside(root: Path, iteration: int, suffix: str) -> Path:
    return root / f".{_folder(root, iteration).name}.{suffix}"
