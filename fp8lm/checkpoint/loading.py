"""Finding a valid checkpoint and loading tensors from it, under any sharding (see `resharding`).

A checkpoint is used only if every file in it has the SHA-256 that was taken when it was written.
The ranks check the files together, each its share. A damaged one is reported and skipped
for the next older one, unless an iteration was asked for explicitly.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fp8lm.checkpoint.collectives import Group, all_or_error, from_all, my_share, on_main
from fp8lm.checkpoint.files import LATEST, find_folder, latest_iteration, saved_iterations
from fp8lm.checkpoint.integrity import LARGEST_OTHER, Contents, check_files, inspect_folder
from fp8lm.checkpoint.location import locate, why_none
from fp8lm.checkpoint.metadata import DamagedCheckpoint, tensor_entries
from fp8lm.checkpoint.resharding import ShardLoadPlanner, Shards
from fp8lm.checkpoint.state_key import StateKey
from fp8lm.checkpoint.storage import read_shards
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import read_regular


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are those that were written.

    `common` is what was saved as `meta`, with `iteration`, `format_version` and the versions that
    wrote it; `files` are the names of those saved beside the tensors; `passed_over` says what was
    wrong with newer ones.
    """

    folder: Path
    common: dict[str, Any]
    metadata: Metadata
    files: frozenset[str] = frozenset()
    passed_over: list[str] = field(default_factory=list)

    @property
    def iteration(self) -> int:
        """The iteration it was saved at."""
        return self.common["iteration"]

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Metadata of the stored tensors."""
        return tensor_entries(self.metadata)

    @cached_property
    def state(self) -> dict[StateKey, TensorStorageMetadata]:
        """Metadata of the stored tensors that belong to a training state."""
        found = ((StateKey.parse(name), stored) for name, stored in self.tensors.items())
        return {key: stored for key, stored in found if key is not None}

    def read_file(self, name: str) -> bytes:
        """The content of one of `files`; `InputError` where there is no such file."""
        if name not in self.files:
            raise InputError(f"{self.folder} holds no {name}")
        try:
            return read_regular(self.folder / name, LARGEST_OTHER)
        except OSError as error:
            raise InputError(f"{self.folder / name} cannot be read: {error.strerror}") from error


def find_checkpoint(
    root: str | os.PathLike[str],
    group: Group = None,
    *,
    up_to: int | None = None,
    needed: Collection[str] = (),
) -> Checkpoint | None:
    """The newest valid checkpoint under `root`, up to the one that the latest file names.

    And up to iteration `up_to`, if that is given; one whose facts lack a key that is `needed` is
    not valid. None where there is no checkpoint at all.
    `InputError` if none of those there is valid, or the newest valid one is of a newer program. A
    collective of `group`.
    """
    root = Path(root)
    iterations, passed_over = on_main(group, lambda: _candidates(root))
    for iteration in iterations:
        if up_to is not None and iteration > up_to:
            continue
        try:
            return _open(root, iteration, group, passed_over, needed)
        except DamagedCheckpoint as error:
            passed_over = [*passed_over, f"iteration {iteration}: {error}"]
    if passed_over:
        raise InputError(f"no valid checkpoint in {root}: {'; '.join(passed_over)}")
    return None


def open_checkpoint(
    root: str | os.PathLike[str],
    iteration: int | None = None,
    group: Group = None,
    *,
    needed: Collection[str] = (),
) -> Checkpoint:
    """Checkpoint `iteration` of `root`, or the newest valid one; `InputError` if there is none.

    `root` may also be one checkpoint, and is that one then. `needed` as for `find_checkpoint`.
    """
    if iteration is None:
        root, iteration = locate(root)
    if iteration is not None:
        return _open(Path(root), iteration, group, [], needed)
    found = find_checkpoint(root, group, needed=needed)
    if found is None:
        raise InputError(f"no checkpoint in {root}: {why_none(Path(root))}")
    return found


def check_fits(checkpoint: Checkpoint, shards: Shards) -> None:
    """Raise `InputError` unless `shards`, which may be on the meta device, are tensors of it."""
    planner = ShardLoadPlanner("")
    planner.set_up_planner(shards, checkpoint.metadata)
    planner.create_local_plan()


def load_checkpoint(
    checkpoint: Checkpoint,
    shards: Shards,
    group: Group = None,
    *,
    ignore_prefix: str | None = None,
    known: Collection[str] = (),
) -> None:
    """Fill the tensors of `shards` in place, bit for bit.

    The checkpoint may hold more tensors than `shards` names if their names begin with
    `ignore_prefix` ("optimizer." for a model alone, "" for any) or are in `known` of some rank.
    Raises `InputError` for a checkpoint of another model, naming the first tensor that differs;
    then nothing is filled.
    """
    read_shards(checkpoint.folder, checkpoint.metadata, shards, group, ignore_prefix, known)


def _candidates(root: Path) -> tuple[list[int], list[str]]:
    """Iterations to try, newest first, and what is wrong with the latest file."""
    found = saved_iterations(root)
    try:
        latest = latest_iteration(root)
    except InputError as error:
        return found, [str(error)]
    if latest is None:
        return found, []
    # Newer ones are of a process that was killed before it had named them, or were set aside by
    # someone who wrote an older iteration into the file.
    older = [iteration for iteration in found if iteration <= latest]
    if latest in found:
        return older, []
    # A number that was damaged must not hide all of them.
    newer = [iteration for iteration in found if iteration > latest]
    return older + newer, [f"iteration {latest}, named by {LATEST}: no such folder"]


def _open(
    root: Path,
    iteration: int,
    group: Group,
    passed_over: list[str],
    needed: Collection[str] = (),
) -> Checkpoint:
    folder, found = on_main(group, lambda: _inspect(root, iteration, needed))
    names = my_share(group, sorted(found.unchecked))
    own = all_or_error(group, lambda: check_files(folder, found.unchecked, names))
    if problems := [problem for result in from_all(group, own) for problem in result]:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DamagedCheckpoint(problems[0] + others)
    return Checkpoint(folder, found.common, found.metadata, found.files, passed_over)


def _inspect(root: Path, iteration: int, needed: Collection[str]) -> tuple[Path, Contents]:
    folder = find_folder(root, iteration)
    if folder is None:
        if iteration in saved_iterations(root):
            raise DamagedCheckpoint(f"what has its name in {root} is no folder")
        raise InputError(f"no checkpoint of iteration {iteration} in {root}")
    found = inspect_folder(folder, needed)
    if (holds := found.common["iteration"]) != iteration:
        raise DamagedCheckpoint(f"{folder} holds iteration {holds}: its folder has been renamed")
    return folder, found
