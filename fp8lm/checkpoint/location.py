"""Resolves a user's path: a folder of checkpoints, one checkpoint, or neither."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fp8lm.checkpoint.files import COMMON, LATEST, find_folder, saved_iterations
from fp8lm.checkpoint.metadata import METADATA

if TYPE_CHECKING:
    from fp8lm.config import CheckpointConfig

_ONE = re.compile(r"iter_([0-9]{7,18})")
_MOST_ENTRIES = 1000  # of a folder that is searched for what may have been meant
_OF_HUGGING_FACE = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def locate(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The folder of checkpoints that `path` is or lies in, and the iteration that it names."""
    path = Path(path)
    if not _has_checkpoints(path):
        # As it is written; from within it, as "."; by a link to it.
        for same in (path, Path(os.path.abspath(path)), Path(os.path.realpath(path))):
            if match := _ONE.fullmatch(same.name):
                return same.parent, int(match[1])
    return path, None


def load_problem(config: CheckpointConfig) -> str | None:
    """Why a run may not start with `config`, which finds no checkpoint to load; None if it may.

    A run that loads from where it saves may begin there. One that finds something may fail later.
    """
    if config.load is None:
        strict = config.exit_on_missing_checkpoint
        return "checkpoint.exit_on_missing_checkpoint needs checkpoint.load" if strict else None
    root, iteration = locate(config.load)
    if iteration is not None:
        return _problem_of_one(config, root, iteration)
    if _holds_any(config.load):
        return None
    meant = _what_is_there(root)
    # A folder beside one of a similar name is a new run's: `runs/run2` beside `runs/run1`.
    starts = meant is None or not os.path.exists(root)
    if config.resumes and not config.exit_on_missing_checkpoint and starts:
        return None
    problem = f"no checkpoint in checkpoint.load = {config.load}: {why_none(root)}"
    if config.exit_on_missing_checkpoint or meant is not None:
        return problem
    return (
        f"{problem}; to start a new run leave checkpoint.load out, or name one folder as save too"
    )


def pretrained_problem(config: CheckpointConfig) -> str | None:
    """Why a run may not start from the weights that `config` names; None if it may, or resumes."""
    if config.pretrained is None or (config.load is not None and _holds_any(config.load)):
        return None
    if _holds_any(config.pretrained):
        return None
    return (
        f"no checkpoint in checkpoint.pretrained = {config.pretrained}: "
        f"{why_none(Path(config.pretrained))}; to start from initial weights leave it out"
    )


def _holds_any(path: str) -> bool:
    """Whether `path` is a checkpoint or a folder of some."""
    root, iteration = locate(path)
    if iteration is not None:
        return find_folder(root, iteration) is not None
    return bool(saved_iterations(root)) or _has_checkpoints(root)


def _problem_of_one(config: CheckpointConfig, root: Path, iteration: int) -> str | None:
    if find_folder(root, iteration) is None:
        return f"checkpoint.load = {config.load} does not exist"
    if config.save is None or config.load is None:
        return None
    if os.path.realpath(config.save) not in (
        os.path.realpath(root),
        os.path.realpath(config.load),
    ):
        return None
    return (
        f"checkpoint.load = {config.load} is one checkpoint, from which every start would begin "
        f"again: save elsewhere than in {config.save}, or write {iteration} into {root / LATEST} "
        f"and set checkpoint.load={root}"
    )


def why_none(root: Path) -> str:
    """Why `root` is no folder of checkpoints: what else it is, or which one was meant."""
    if (meant := _what_is_there(root)) is not None:
        return meant
    if not os.path.exists(root):
        return "it does not exist"
    return f"it holds no {LATEST}" if os.path.isdir(root) else "it is not a folder"


def _what_is_there(root: Path) -> str | None:
    """What else than a folder of checkpoints `root` is, or which one was meant; None if unknown."""
    if is_checkpoint(root):
        return "it is one checkpoint under another name: name it iter_ and seven digits again"
    if os.path.exists(root / METADATA):
        return "it holds tensors of torch.distributed.checkpoint that another program wrote"
    if any(next(root.glob(pattern), None) for pattern in _OF_HUGGING_FACE):
        return "it looks like a Hugging Face model: tools/convert_checkpoint.py --from hf"
    if meant := next((folder for folder in _folders(root) if _has_checkpoints(folder)), None):
        return f"did you mean {meant}?"
    siblings = [] if os.path.exists(root) else list(filter(_has_checkpoints, _folders(root.parent)))
    close = difflib.get_close_matches(root.name, [folder.name for folder in siblings], 1)
    return f"it does not exist: did you mean {root.parent / close[0]}?" if close else None


def _folders(root: Path) -> Iterator[Path]:
    try:
        with os.scandir(root) as entries:
            for entry in islice(entries, _MOST_ENTRIES):
                if entry.is_dir():
                    yield root / entry.name
    except OSError:
        return


def _has_checkpoints(folder: Path) -> bool:
    return os.path.exists(folder / LATEST)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is one checkpoint, whatever its name."""
    return all(os.path.exists(folder / name) for name in (COMMON, METADATA))
