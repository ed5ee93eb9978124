"""Checks the folder a run saves to: writable, shared by all ranks, and not another run's."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fp8lm.checkpoint.collectives import Group, from_all, on_main
from fp8lm.checkpoint.files import make_save_folder, quarantine_newer, saved_iterations
from fp8lm.checkpoint.location import is_checkpoint
from fp8lm.runtime.errors import InputError


def check_save_folder(root: str | os.PathLike[str], group: Group = None) -> None:
    """Make `root` and remove what killed processes left in it.

    `InputError` if it is not writable, or is not the same folder for all ranks of `group`, as one
    on a disk of each machine is not.
    """
    root = Path(root)
    if on_main(group, lambda: is_checkpoint(root)):
        raise InputError(f"checkpoint.save = {root} is a checkpoint: name the folder that holds it")
    token = on_main(group, lambda: _leave_token(root))
    seen = from_all(group, os.path.exists(token))
    on_main(group, lambda: token.unlink(missing_ok=True))
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise InputError(
            f"cannot save checkpoints in {root}: rank {blind[0]} (of {len(blind)} ranks) does not "
            "see what rank 0 writes there: name a folder that all machines share, by its whole path"
        )


def claim_save_dir(
    root: str | os.PathLike[str], after: int, own: bool, group: Group = None
) -> list[int]:
    """Claim `root` for a run that resumes at iteration `after`; returns the iterations moved aside.

    `own`: the run has loaded from `root`; newer checkpoints are moved to `files.SET_ASIDE`.
    Otherwise checkpoints in `root` are another run's, which this run would replace and delete:
    `InputError`; also if newer ones cannot be moved.
    """
    root = Path(root)
    if own:
        try:
            return on_main(group, lambda: quarantine_newer(root, after))
        except OSError as error:
            raise InputError(f"cannot move newer checkpoints in {root} aside: {error}") from error
    if problem := on_main(group, lambda: foreign_checkpoints(root)):
        raise InputError(problem)
    return []


def foreign_checkpoints(root: Path) -> str | None:
    """Why a run that does not load from `root` may not save there; None if it may."""
    if not (found := saved_iterations(root)):
        return None
    return (
        f"checkpoint.save = {root} holds checkpoints up to iteration {found[0]}, and this run does "
        f"not go on from them: set checkpoint.load={root} as well, or save to a new folder"
    )


def _leave_token(root: Path) -> Path:
    try:
        make_save_folder(root)
        token = root / f".seen_by_all.{secrets.token_hex(8)}"
        token.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"cannot save checkpoints in {root}: {error.strerror or error}") from error
    return token
