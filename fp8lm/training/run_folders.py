"""The folders that a run writes to, and their locks, which it holds while it lives."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lm.checkpoint.collectives import on_main
from fp8lm.checkpoint.location import is_checkpoint
from fp8lm.config import Config
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.run_lock import RunFolder, RunLocks

if TYPE_CHECKING:
    from fp8lm.comm.groups import ProcessGroups


def run_folders(config: Config) -> list[RunFolder]:
    """Folders that no two runs may share, since their files have the same names in every run."""
    save, logging = config.checkpoint.save, config.logging
    found = []
    if save is not None:
        complaint = f"cannot save checkpoints in {save}"
        found.append(RunFolder(save, f"checkpoint.save={save}", complaint))
    # Beside a `dir`, wandb's folder holds only files of its own, which have names of their own.
    key = "dir" if logging.dir is not None or logging.wandb_project is None else "wandb_save_dir"
    if (folder := getattr(logging, key)) is not None:
        named = f"logging.{key}={folder}"
        found.append(RunFolder(folder, named, f"{named} cannot be written to"))
    return found


def refuse_checkpoints(folders: Iterable[RunFolder]) -> None:
    """`InputError` for a folder that is, or lies in, a checkpoint: added files would damage it."""
    for folder in folders:
        path = Path(os.path.realpath(folder.path))
        if (found := next(filter(is_checkpoint, (path, *path.parents)), None)) is not None:
            where = "is a checkpoint" if found == path else f"lies in the checkpoint {found}"
            raise InputError(f"{folder.key} {where}: name a folder outside of it")


@contextmanager
def locked_folders(config: Config, groups: ProcessGroups) -> Iterator[RunLocks]:
    """Hold the locks of the run's folders, on the main rank; a collective of all ranks.

    `FolderInUse` on all ranks where another run holds one. The locks are released at the end of
    what is being written then.
    """
    locks, found = RunLocks(), run_folders(config)
    on_main(groups.saving, lambda: refuse_checkpoints(found))
    on_main(groups.saving, lambda: locks.take(found))
    try:
        yield locks
    finally:
        locks.release()
