"""The checkpoints of a run: what is in them, when one is due, going on from one, going back to one.

A checkpoint that cannot be written does not end the training: it is reported, the one before it is
intact, and the next is tried when it is due. The last one of a run must be written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fp8lm.checkpoint import (
    Checkpoint,
    CheckpointSaver,
    Retention,
    Shard,
    check_save_folder,
    find_checkpoint,
    load_checkpoint,
)
from fp8lm.checkpoint.files import forget_after
from fp8lm.checkpoint.together import on_main
from fp8lm.errors import InputError
from fp8lm.training.build import Run
from fp8lm.training.changes import changed_keys
from fp8lm.training.console import saved_line
from fp8lm.training.progress import Progress, Window
from fp8lm.training.spikes import LossWatch
from fp8lm.training.state import model_shards, optimizer_shards, without


class RunCheckpoints:
    """Saves and loads `run` with its `window`, `progress` and `losses`; a collective of all ranks.

    `report` takes a line of text.
    """

    def __init__(
        self,
        run: Run,
        window: Window,
        progress: Progress,
        losses: LossWatch,
        report: Callable[[str], None],
    ) -> None:
        self._run, self._window, self._progress, self._losses = run, window, progress, losses
        self._report, self._group = report, run.groups.saving
        self._config = config = run.config.checkpoint
        self._saver = None
        self._saved_iteration: int | None = None
        if config.save is not None:
            # Now, not after hours of training.
            on_main(self._group, lambda: check_save_folder(config.save))
            self._saver = CheckpointSaver(
                config.save,
                self._group,
                asynchronous=config.async_save,
                retention=Retention(config.keep_last, config.save_retain_interval),
            )

    def load(self) -> None:
        """Go on from the newest valid checkpoint of `checkpoint.load`.

        A folder without any starts a new run, so that one command serves to start and to resume.
        Raises `InputError` for a checkpoint that does not fit this model or precision.
        """
        folder = self._config.load
        if folder is None:
            return
        found = find_checkpoint(folder, self._group)
        if found is None:
            self._report(f" no checkpoint in {folder}: starting from initial weights")
            return
        for problem in found.passed_over:
            self._report(f" warning: passed over a checkpoint: {problem}")
        config = self._run.config.model_dump(mode="json")
        changed = ", ".join(changed_keys(found.common["config"], config))
        try:
            self._fill(found)
        except InputError as error:
            if not changed:
                raise
            raise InputError(f"{error}; changed since then: {changed}") from error
        self._saved_iteration = found.iteration
        self._report(f" loaded checkpoint of iteration {found.iteration} from {folder}")
        if changed:
            self._report(f" note: changed since that checkpoint: {changed}")

    def save(self) -> None:
        """Begin a checkpoint, unless this iteration has one."""
        if self._saver is None or self._saved_iteration == self._progress.iteration:
            return
        self._run.optimizer.share_amax()
        self._run.replicas.wait_for_weights()
        remembered = self._run.replicas.named_tensors()
        meta: dict[str, Any] = {
            **asdict(self._progress),
            "losses": self._losses.state,
            "gradient_tensors": len(remembered),
            "config": self._run.config.model_dump(mode="json"),
        }
        # A table that two stages have is cut into rows by each in its own way: one writes it.
        shards = without(self._shards(remembered), self._run.counted_elsewhere)
        self._saver.save(self._progress.iteration, shards, meta)
        self._saved_iteration = self._progress.iteration

    def tell(self) -> None:
        """Report the checkpoints that have been written, or not, since."""
        for outcome in self._saver.collect() if self._saver is not None else ():
            if outcome.error is None:
                self._report(saved_line(outcome.iteration, self._config.save))
            else:
                self._report(f" warning: {outcome.error}; the training goes on")
                self._saved_iteration = None

    def finish(self) -> None:
        """Save, and wait until that is on disk; raises `SaveError` if it does not get there."""
        if self._saver is None:
            return
        self._saver.wait()
        self.tell()
        self.save()
        self._saver.close()
        for outcome in self._saver.collect():
            if outcome.error is not None:
                raise outcome.error
            self._report(saved_line(outcome.iteration, self._config.save))

    def go_back(self, before: int) -> int | None:
        """Return to the newest valid checkpoint older than iteration `before`; its iteration.

        Newer ones are deleted. None if there is none to go back to.
        """
        self._saver.wait()
        self.tell()
        found = find_checkpoint(self._config.save, self._group, up_to=before - 1)
        if found is None:
            return None
        on_main(self._group, lambda: forget_after(self._saver.root, found.iteration))
        self._fill(found)
        self._saved_iteration = found.iteration
        return found.iteration

    def _fill(self, checkpoint: Checkpoint) -> None:
        # A reduction that remembers nothing passes over what another remembered, and one that has
        # nothing to remember yet starts anew.
        common, remembered = checkpoint.common, self._run.replicas.named_tensors()
        if common.get("released"):
            raise InputError(
                f"{checkpoint.folder} is a release, without optimizer states: a training goes on "
                "from the checkpoint that it was made of"
            )
        if not (stored := common["gradient_tensors"]):
            remembered = {}
        self._run.replicas.wait_for_weights()
        partial = bool(stored) and not remembered
        load_checkpoint(checkpoint, self._shards(remembered), self._group, partial=partial)
        for name in asdict(self._progress):
            setattr(self._progress, name, common[name])
        self._losses.restore(common["losses"])

    def _shards(self, remembered: dict[str, Tensor]) -> dict[str, list[Shard]]:
        return {
            **model_shards(self._run.weights),
            **optimizer_shards(self._run.optimizer),
            "window": [Shard.whole(self._window.sums)],
            **{f"gradient.{name}": [Shard.whole(mu)] for name, mu in remembered.items()},
        }
