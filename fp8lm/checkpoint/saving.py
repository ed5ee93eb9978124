"""Writing one checkpoint: aside, hashed and synced, and then to its name at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import fp8lm
from fp8lm.checkpoint.facts import FORMAT_VERSION
from fp8lm.checkpoint.files import (
    Retention,
    latest_iteration,
    publish,
    remove,
    saved_iterations,
    settle,
    start_writing,
)
from fp8lm.checkpoint.planners import Shards, ShardSavePlanner
from fp8lm.checkpoint.storage import write_shards
from fp8lm.checkpoint.together import Group, from_all, is_main, on_main
from fp8lm.errors import InputError


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


class RetentionError(SaveError):
    """A checkpoint is written, but not all that should have gone for it could be deleted."""


def save_checkpoint(
    root: str | os.PathLike[str],
    iteration: int,
    shards: Shards | ShardSavePlanner,
    meta: Mapping[str, Any],
    group: Group = None,
    retention: Retention = Retention(),  # noqa: B008 (frozen)
) -> Path:
    """Write `shards` and `meta` (JSON values) as checkpoint `iteration` under `root`; its folder.

    `shards` maps the name of every logical tensor to this rank's pieces of it; all ranks of `group`
    call together. A checkpoint of the same iteration is replaced, and those that `retention` lets
    go of are deleted afterwards. Raises `SaveError` if writing fails, as on a full disk, and
    `RetentionError` if only the deleting does.
    """
    root = Path(root)
    planner = shards if isinstance(shards, ShardSavePlanner) else ShardSavePlanner(shards)
    common = _common_text(iteration, meta)
    try:
        folder = on_main(group, lambda: start_writing(root, iteration))
        written = from_all(group, write_shards(folder, planner, group))
        digests = {name: digest for files in written for name, digest in files.items()}
        folder = on_main(group, lambda: publish(root, iteration, common, digests))
    except BaseException as error:
        # Whatever failed has been raised on all ranks, so none is still writing.
        if is_main(group):
            with suppress(OSError):
                settle(root)
        if isinstance(error, OSError):
            raise SaveError(_failure(root, iteration, error)) from error
        raise
    try:
        on_main(group, lambda: _clear(root, retention, iteration))
    except OSError as error:
        raise RetentionError(
            f"{folder} is saved, but not all older ones can be removed: {error}"
        ) from error
    return folder


def _clear(root: Path, retention: Retention, latest: int) -> None:
    remove(root, retention.superseded(saved_iterations(root), latest))


def _common_text(iteration: int, meta: Mapping[str, Any]) -> str:
    common = {
        **meta,
        "iteration": iteration,
        "format_version": FORMAT_VERSION,
        "fp8lm_version": fp8lm.__version__,
        "torch_version": torch.__version__,
    }
    return json.dumps(common, indent=1, allow_nan=False) + "\n"


def _failure(root: Path, iteration: int, error: OSError) -> str:
    text = f"could not write the checkpoint of iteration {iteration} in {root}: {error}"
    with suppress(InputError):
        latest = latest_iteration(root)
        kept = "there is none before it" if latest is None else f"that of {latest} is intact"
        return f"{text}; {kept}"
    return text
