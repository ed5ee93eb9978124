"""Saving and resuming a run: which tensors, which facts, and what to check on the way back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fp8lm.training.build import Run
from fp8lm.training.checkpoint import (
    Shard,
    latest_iteration,
    load_checkpoint,
    read_common,
    save_checkpoint,
)
from fp8lm.training.progress import Progress, Window
from fp8lm.training.state import model_shards, optimizer_shards


def save_run(run: Run, window: Window, progress: Progress) -> None:
    """Write a checkpoint of everything the rest of the run depends on."""
    run.optimizer.share_amax()
    run.replicas.wait_for_weights()
    meta: dict[str, Any] = {
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "batch_size": progress.batch_size,
        "gradient_tensors": len(run.replicas.named_tensors()),
        "config": run.config.model_dump(mode="json"),
    }
    save_checkpoint(
        run.config.checkpoint.save,
        progress.iteration,
        _shards(run, window, run.replicas.named_tensors()),
        meta,
    )


def load_run(run: Run, window: Window, progress: Progress) -> None:
    """Fill `run`, `window` and `progress` from the newest checkpoint of `checkpoint.load`.

    A folder without a checkpoint starts a new run, so that one command serves to start and to
    resume. Raises `InputError` for a checkpoint that does not fit this model or precision.
    """
    folder = run.config.checkpoint.load
    if folder is None:
        return
    if latest_iteration(folder) is None:
        if run.groups.is_main:
            print(f" no checkpoint in {folder}: starting from initial weights", flush=True)
        return
    # A reduction that remembers nothing passes over what another remembered, and one that has
    # nothing to remember yet starts anew.
    remembered = run.replicas.named_tensors()
    if not (stored := read_common(folder)["gradient_tensors"]):
        remembered = {}
    shards = _shards(run, window, remembered)
    meta = load_checkpoint(folder, shards, partial=bool(stored) and not remembered)
    progress.iteration = meta["iteration"]
    progress.consumed_samples = meta["consumed_samples"]
    progress.batch_size = meta["batch_size"]
    if run.groups.is_main:
        print(f" loaded checkpoint of iteration {progress.iteration} from {folder}", flush=True)


def _shards(run: Run, window: Window, mus: dict[str, Tensor]) -> dict[str, list[Shard]]:
    return {
        **model_shards(run.weights),
        **optimizer_shards(run.optimizer),
        "window": [Shard.whole(window.sums)],
        **{f"gradient.{name}": [Shard.whole(mu)] for name, mu in mus.items()},
    }
