"""Where checkpoints lie in a folder, and how one gets there whole or not at all.

ROOT/latest_checkpointed_iteration.txt   the iteration to resume from, written last
ROOT/iter_0000100/                       a checkpoint: .metadata, __R_W.distcp, common.json
ROOT/.iter_0000100.tmp/                  one being written
ROOT/.iter_0000100.old/                  one being replaced by another of the same iteration
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fp8lm.errors import InputError

LATEST = "latest_checkpointed_iteration.txt"
COMMON = "common.json"


def latest_iteration(root: str | os.PathLike[str]) -> int | None:
    """The iteration of the newest checkpoint under `root`, None if there is none.

    Raises `InputError` if the file that says so is unreadable.
    """
    path = Path(root) / LATEST
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is unreadable: {error}") from error
    if not text.strip().isdecimal():
        raise InputError(f"{path}: expected the number of an iteration, found {text.strip()!r}")
    return int(text)


def find_folder(root: Path, iteration: int | None) -> Path:
    """The folder of checkpoint `iteration`, None being the latest; `InputError` if missing."""
    wanted = latest_iteration(root) if iteration is None else iteration
    if wanted is None:
        raise InputError(f"no checkpoint in {root}: {LATEST} is missing")
    # A process killed while replacing a checkpoint may have left only the one set aside.
    for folder in (_folder(root, wanted), _aside(root, wanted, "old")):
        if folder.is_dir():
            return folder
    source = f"{LATEST} names it" if iteration is None else "asked for"
    raise InputError(f"no checkpoint of iteration {wanted} in {root} ({source})")


def check_save_folder(root: str | os.PathLike[str]) -> None:
    """Make `root` and remove what killed processes left in it; `InputError` if not writable."""
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {root}")
    except OSError as error:
        raise InputError(f"cannot save checkpoints in {root}: {error}") from error
    settle(root)


def start_writing(root: Path, iteration: int) -> Path:
    """Make the empty folder that the checkpoint is first written to."""
    check_save_folder(root)
    folder = _aside(root, iteration, "tmp")
    folder.mkdir()
    return folder


def publish(root: Path, iteration: int, common: str) -> Path:
    """Give the written checkpoint its name, then let the latest file name it."""
    written, folder = _aside(root, iteration, "tmp"), _folder(root, iteration)
    write_durably(written / COMMON, common)
    _sync_folder(written)
    if folder.exists():
        folder.rename(_aside(root, iteration, "old"))
    written.rename(folder)
    _sync_folder(root)
    write_durably(root / LATEST, f"{iteration}\n")
    settle(root)
    return folder


def settle(root: Path) -> None:
    """Undo what was begun and not finished; a no-op in a folder where all is well."""
    for replaced in root.glob(".iter_*.old"):
        folder = root / replaced.name[1:].removesuffix(".old")
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)
    for unfinished in root.glob(".iter_*.tmp"):
        shutil.rmtree(unfinished)


def write_durably(path: Path, text: str) -> None:
    """Write a file aside, fsync it, and move it to `path` at once."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def _aside(root: Path, iteration: int, suffix: str) -> Path:
    return root / f".{_folder(root, iteration).name}.{suffix}"


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds the name is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
