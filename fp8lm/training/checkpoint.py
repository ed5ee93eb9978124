"""Checkpoints that load under any sharding, whatever the sharding they were saved under.

`shards` maps the name of every logical tensor to this rank's piece or pieces of it. All ranks of
`group` (None: the default group, or no group at all in a process that has none) call together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import fp8lm
from fp8lm.errors import InputError
from fp8lm.training.checkpoint_files import (
    COMMON,
    check_save_folder,
    find_folder,
    latest_iteration,
    publish,
    settle,
    start_writing,
)
from fp8lm.training.checkpoint_metadata import read_metadata
from fp8lm.training.checkpoint_planners import Shards
from fp8lm.training.checkpoint_storage import Group, check_files, read_shards, write_shards
from fp8lm.training.shard import Shard

__all__ = [
    "FORMAT_VERSION",
    "SaveError",
    "Shard",
    "check_save_folder",
    "latest_iteration",
    "load_checkpoint",
    "read_common",
    "save_checkpoint",
]

FORMAT_VERSION = 1

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


def save_checkpoint(
    root: str | os.PathLike[str],
    iteration: int,
    shards: Shards,
    meta: Mapping[str, Any],
    group: Group = None,
) -> Path:
    """Write `shards` and `meta` (JSON values) as checkpoint `iteration` under `root`; its folder.

    A checkpoint of the same iteration is replaced. Raises `InputError` if `root` cannot be
    written to, `SaveError` if writing fails, as on a full disk.
    """
    root = Path(root)
    common = _common_text(iteration, meta)
    try:
        folder = _on_main(group, lambda: start_writing(root, iteration))
        write_shards(folder, shards, group)
        return _on_main(group, lambda: publish(root, iteration, common))
    except BaseException as error:
        # Whatever failed has been raised on all ranks, so none is still writing.
        if _is_main(group):
            with suppress(OSError):
                settle(root)
        if isinstance(error, OSError):
            raise SaveError(_failure(root, iteration, error)) from error
        raise


def load_checkpoint(
    root: str | os.PathLike[str],
    shards: Shards,
    iteration: int | None = None,
    group: Group = None,
    *,
    partial: bool = False,
) -> dict[str, Any]:
    """Fill the tensors of `shards` in place, bit for bit; returns what was saved as `meta`.

    `iteration` None is the latest; with `partial`, the checkpoint may hold more tensors than
    `shards` names, as one with optimizer states does for a model alone. Raises `InputError` for a
    missing, damaged or newer checkpoint, and for one of another model, which names the first
    tensor that differs.
    """
    folder, common, metadata = _on_main(group, lambda: _open(Path(root), iteration))
    read_shards(folder, metadata, shards, group, partial)
    return common


def read_common(root: str | os.PathLike[str], iteration: int | None = None) -> dict[str, Any]:
    """What was saved as `meta`, with `iteration`, `format_version` and the versions that wrote it.

    Raises `InputError` as `load_checkpoint` does.
    """
    path = find_folder(Path(root), iteration) / COMMON
    try:
        common = json.loads(path.read_text())
        version = common["format_version"]
        newer = version > FORMAT_VERSION
    except FileNotFoundError:
        raise InputError(f"the checkpoint {path.parent} is incomplete: no {COMMON}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is unreadable or damaged: {error!r}") from error
    if newer:
        raise InputError(
            f"{path.parent} has format version {version}, written by fp8lm "
            f"{common.get('fp8lm_version')}; this is fp8lm {fp8lm.__version__}, which reads up to "
            f"{FORMAT_VERSION}: upgrade it"
        )
    return common


def _open(root: Path, iteration: int | None) -> tuple[Path, dict[str, Any], Any]:
    folder = find_folder(root, iteration)
    common, metadata = read_common(root, iteration), read_metadata(folder)
    check_files(folder, metadata)
    return folder, common, metadata


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


def _is_main(group: Group) -> bool:
    return not dist.is_initialized() or dist.get_rank(group) == 0


def _on_main(group: Group, action: Callable[[], T]) -> T:
    """Run `action` on rank 0; its result or its exception comes to all ranks."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if _is_main(group):
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
