"""Writes one checkpoint: under a temporary name, hashed and synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import fp8lm
from fp8lm.checkpoint.collectives import Group, from_all, is_main, on_main
from fp8lm.checkpoint.facts import FORMAT_VERSION
from fp8lm.checkpoint.files import (
    COMMON,
    NO_ROOM,
    Retention,
    anybody_may,
    latest_iteration,
    publish,
    remove,
    remove_unfinished_saves,
    saved_iterations,
    start_writing,
)
from fp8lm.checkpoint.resharding import Shards, ShardSavePlanner
from fp8lm.checkpoint.room import describe_room, make_room
from fp8lm.checkpoint.storage import write_shards
from fp8lm.runtime.errors import InputError, LockLost, RunFailed


class SaveError(RunFailed):
    """A checkpoint could not be written; the newest valid one before it is as it was."""


class RetentionError(SaveError):
    """A checkpoint is written, but not all that should have gone for it could be deleted."""


def save_checkpoint(
    root: str | os.PathLike[str],
    iteration: int,
    shards: Shards | ShardSavePlanner,
    meta: Mapping[str, Any],
    group: Group = None,
    retention: Retention = Retention(),  # noqa: B008 (frozen)
    verify_owner: Callable[[], None] = anybody_may,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write `shards` and `meta` (JSON values) as checkpoint `iteration` under `root`; its folder.

    `shards` maps the name of every logical tensor to this rank's pieces of it; all ranks of `group`
    call together. `files` (of rank 0, by plain name) are kept beside them. A checkpoint of the same
    iteration is replaced, and those that `retention` lets go of are deleted afterwards, or before
    where the disk is full (see `room`). `verify_owner` raises where another run has taken the
    folder over: it is called before anything is made, published or deleted. Raises `SaveError` if
    writing fails, and `RetentionError` if only the deleting does.
    """
    root = Path(root)
    planner = shards if isinstance(shards, ShardSavePlanner) else ShardSavePlanner(shards)
    files = {**files, COMMON: common_text(iteration, meta).encode()}
    try:
        folder = _write(root, iteration, planner, files, group, verify_owner)
    except OSError as error:
        if error.errno not in NO_ROOM or not make_room(
            root, iteration, retention, group, verify_owner
        ):
            raise _failure(root, iteration, retention, error) from error
        try:
            folder = _write(root, iteration, planner, files, group, verify_owner)
        except OSError as again:
            raise _failure(root, iteration, retention, again) from again
    try:
        on_main(group, lambda: _clear(root, retention, iteration, verify_owner))
    except LockLost:
        raise
    except (OSError, InputError) as error:
        raise RetentionError(
            f"{folder} is saved, but not all older ones can be removed: {error}"
        ) from error
    return folder


def _write(
    root: Path,
    iteration: int,
    planner: ShardSavePlanner,
    files: Mapping[str, bytes],
    group: Group,
    verify_owner: Callable[[], None],
) -> Path:
    """Write one checkpoint; what fails is raised on all ranks, and leaves nothing behind."""
    try:
        on_main(group, verify_owner)
        folder = on_main(group, lambda: start_writing(root, iteration))
        written = from_all(group, write_shards(folder, planner, group))
        digests = {name: digest for files in written for name, digest in files.items()}
        return on_main(group, lambda: publish(folder, iteration, digests, files, verify_owner))
    except BaseException:
        # Whatever failed has been raised on all ranks, so none is still writing.
        if is_main(group):
            with suppress(OSError, LockLost):
                verify_owner()
                remove_unfinished_saves(root)
        raise


def _clear(root: Path, retention: Retention, latest: int, verify_owner: Callable[[], None]) -> None:
    verify_owner()
    remove(root, retention.superseded(saved_iterations(root), latest))


def common_text(iteration: int, meta: Mapping[str, Any]) -> str:
    """The content of `common.json`."""
    common = {
        **meta,
        "iteration": iteration,
        "format_version": FORMAT_VERSION,
        "fp8lm_version": fp8lm.__version__,
        "torch_version": torch.__version__,
    }
    return json.dumps(common, indent=1, allow_nan=False) + "\n"


def _failure(root: Path, iteration: int, retention: Retention, error: OSError) -> SaveError:
    text = f"could not write the checkpoint of iteration {iteration} in {root}: {error}"
    with suppress(InputError):
        latest = latest_iteration(root)
        kept = "there is none before it" if latest is None else f"that of {latest} is intact"
        text = f"{text}; {kept}"
    return SaveError(text + describe_room(root, error, retention))
