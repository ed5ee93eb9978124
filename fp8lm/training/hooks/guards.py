"""Hooks that stop a run, roll it back, or name the rank that holds it up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from fp8lm.comm.env import DistEnv
from fp8lm.comm.groups import ProcessGroups
from fp8lm.config import CheckpointConfig, TrainConfig
from fp8lm.runtime.errors import RunFailed
from fp8lm.runtime.run_lock import RunLocks
from fp8lm.training.progress import HostScalars
from fp8lm.training.spikes import LossSpike, RollBack
from fp8lm.training.stopping import StopRequests, describe_interruption
from fp8lm.training.trainer import LAST_SAVE, STEP, Trainer, TrainerHook
from fp8lm.training.watchdog import Watchdog


class StopHook(TrainerHook):
    """Hears signals while the training runs.

    A KeyboardInterrupt saves nothing and names the checkpoint to resume from.
    """

    def __init__(
        self, train: TrainConfig, checkpoint: CheckpointConfig, launch: DistEnv, locks: RunLocks
    ) -> None:
        self._checkpoint, self._launch = checkpoint, launch
        self._requests = StopRequests(train, launch, locks)

    @contextmanager
    def running(self, trainer: Trainer) -> Iterator[None]:
        """See `TrainerHook`."""
        try:
            with self._requests:
                yield
        except KeyboardInterrupt as interrupt:
            iteration = trainer.progress.iteration
            said = describe_interruption(self._checkpoint, self._launch, iteration)
            interrupt.args = (said,)
            raise

    def stop_reason(self) -> float:
        """See `TrainerHook`."""
        return self._requests.reason


class WatchdogHook(TrainerHook):
    """Names the rank that a phase waits for when it takes `factor` times the usual."""

    def __init__(self, groups: ProcessGroups, factor: float) -> None:
        self._watchdog = Watchdog(groups, factor)

    def running(self, trainer: Trainer) -> AbstractContextManager[object]:
        """See `TrainerHook`."""
        return self._watchdog

    def phase(self, trainer: Trainer, name: str) -> AbstractContextManager[None]:
        """See `TrainerHook`."""
        if name == STEP:
            return self._watchdog.step(trainer.progress.iteration + 1)
        return self._watchdog.phase(name)


class SkippedStepsHook(TrainerHook):
    """Saves and fails after `limit` steps in a row that non-finite values have skipped."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def on_scalars(self, trainer: Trainer, scalars: HostScalars) -> None:
        """See `TrainerHook`."""
        skipped = int(scalars.skipped_in_a_row)
        if skipped >= self._limit:
            with trainer.phase(LAST_SAVE):
                trainer.checkpoints.finish()
            raise RunFailed(
                f"{skipped} steps in a row were skipped on non-finite values (train."
                f"max_consecutive_skips={self._limit}); weights are those before the first of them"
            )


class LossSpikeHook(TrainerHook):
    """Rolls a run back to before a spike, at most `max_rollbacks` times."""

    def __init__(self, max_rollbacks: int) -> None:
        self._max_rollbacks = max_rollbacks

    def on_scalars(self, trainer: Trainer, scalars: HostScalars) -> None:
        """See `TrainerHook`."""
        try:
            trainer.losses.add(scalars.iteration, scalars.loss)
        except LossSpike as spike:
            self._answer(trainer, spike)

    def _answer(self, trainer: Trainer, spike: LossSpike) -> None:
        """Raise `RollBack`, or go on where there is nothing to go back to.

        `RunFailed` if it would be once too often.
        """
        limit = self._max_rollbacks
        if trainer.progress.rollbacks >= limit:
            trainer.checkpoints.wait()  # the process ends without the thread that is writing
            raise RunFailed(f"{spike}, after {limit} rollbacks (train.max_rollbacks): stopped")
        checkpoint = trainer.checkpoints.find_before(spike.first)
        if checkpoint is not None:
            raise RollBack(spike, checkpoint)
        trainer.say(f" warning: {spike}, and no checkpoint before it: going on")
        trainer.losses.forget()
