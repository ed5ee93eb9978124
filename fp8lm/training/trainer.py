"""The training loop, and the hooks that do everything else around its steps.

    running                                 around all that follows
        on_start
        until the end, a stop or a rollback:
            before_step
            the step                        inside phase(STEP)
            on_scalars                      on a GPU with those of the step before
            after_step
        on_end

A hook subclasses `TrainerHook` and overrides what it needs; those of every run are in
`fp8lm.training.hooks`: stop requests, reports, watchdog, skipped steps, loss spikes, evaluation,
checkpoints. All ranks call all hooks in one order, so that a hook may use collectives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

from fp8lm.checkpoint.collectives import on_main
from fp8lm.comm.env import DistEnv
from fp8lm.data.batches import BatchIterator
from fp8lm.runtime.errors import LockLost
from fp8lm.runtime.run_lock import RunLocks
from fp8lm.training.build import Run, build_guard, resize_datasets
from fp8lm.training.checkpointing import RunCheckpoints
from fp8lm.training.evaluation import run_batches
from fp8lm.training.progress import AsyncScalars, HostScalars, MetricAccumulator, Progress
from fp8lm.training.run_length import describe_changed_batches, is_over
from fp8lm.training.spikes import LossSpikeDetector, RollBack
from fp8lm.training.step import StepResult, seed_generators, train_step
from fp8lm.training.stopping import LOCK_LOST, describe_stop, exit_code
from fp8lm.training.train_state import TrainState

STEP = "step"
LAST_SAVE = "saving the last checkpoint"


class TrainerHook:
    """Callbacks around the steps of a training; every method does nothing by default."""

    def running(self, trainer: Trainer) -> AbstractContextManager[object]:
        """Context around the whole training, also of a run without steps left; for resources."""
        return nullcontext()

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, if there is one."""

    def phase(self, trainer: Trainer, name: str) -> AbstractContextManager[None]:
        """Context around a phase: `STEP`, an evaluation, saving a checkpoint."""
        return nullcontext()

    def stop_reason(self) -> float:
        """Why this rank asks to stop after the step that begins (0: it does not).

        A signal's number or a constant of `stopping`; all ranks act on the largest of all.
        """
        return 0.0

    def before_step(self, trainer: Trainer) -> None:
        """The next iteration is `trainer.progress.iteration + 1`."""

    def on_scalars(self, trainer: Trainer, scalars: HostScalars) -> None:
        """The scalars of a step are on the host; may raise `RollBack`, or what ends the run."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """A step has been started; to read `result` is a host synchronisation."""

    def on_evaluation(self, trainer: Trainer, split: str, loss: float) -> None:
        """The mean loss (nats per token) on `split`: validation or test."""

    def on_metrics(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Numbers of this iteration to report, under the keys of metrics.jsonl."""

    def on_message(self, trainer: Trainer, line: str) -> None:
        """A message to report, one line."""

    def on_rollback(self, trainer: Trainer) -> None:
        """The run is back at `trainer.progress.iteration`; later iterations will be repeated."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, unless an error ends the run."""


class Trainer:
    """Trains `run`, from where `load` leaves it to its end; `locks` are of the run's folders.

    `hooks` act in their order. They may read all that is public here: `window` are the sums since
    the last report, `sent` the bytes that this rank sent in the last step, by wire, `guard` that of
    FP8 GEMMs, if there is one. `exits`, set on
    all ranks alike, ends the training after the step.
    """

    def __init__(
        self, run: Run, hooks: Sequence[TrainerHook], locks: RunLocks | None = None
    ) -> None:
        train = run.config.train
        self.run, self.hooks = run, list(hooks)
        self.locks = RunLocks() if locks is None else locks
        self.progress = Progress()
        self.window = MetricAccumulator(run.device, run.training_objective.metrics)
        self.losses = LossSpikeDetector(train.loss_spike_threshold, train.loss_spike_patience)
        self.guard = build_guard(run)
        state = TrainState(run, self.window, self.progress, self.losses, self.guard)
        self.checkpoints = RunCheckpoints(state, self.say, self.locks)
        self.sent: dict[str, int] = {}
        self.stop, self.exits = 0.0, False
        self._scalars = AsyncScalars()

    def load(self) -> None:
        """Claim `checkpoint.save`, go on from `checkpoint.load`, and fit the data to it."""
        self.checkpoints.open()
        self.checkpoints.load()
        position = self.progress.iteration, self.progress.consumed_samples
        note = describe_changed_batches(self.run.config.train, *position)
        if note is not None and not self.finished:
            self.say(note)
        self._fit_datasets()

    def train(self) -> int:
        """Train to the end or until a stop is requested; saves before returning.

        Returns the exit code: 0, or that of `stopping` if a signal or the time asked to stop.
        RuntimeError before `load`, without which a run would write over another's checkpoints.
        """
        if not self.checkpoints.is_open:
            raise RuntimeError("load() comes before train()")
        on_main(self.run.groups.saving, self.locks.verify)
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.running(self))
            if self.finished:
                self.say(f" nothing left to do: {self.progress.iteration} iterations done")
                return 0
            for hook in self.hooks:
                hook.on_start(self)
            while not self.over:
                self._train_until_rollback()
            if self.stop == LOCK_LOST:
                self.locks.verify()  # the main rank knows who has them
                raise LockLost("another run has taken the folders of this one over")
            self.run.data_parallel.finish_param_sync()  # wait for the collectives of the last step
            for hook in self.hooks:
                hook.on_end(self)
            return 0 if self.finished or not self.stop else self._report_stop()

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        run, progress = self.run, self.progress
        position = progress.iteration, progress.consumed_samples
        return is_over(run.config.train, run.batch_size, *position)

    @property
    def over(self) -> bool:
        """Whether no step follows, now."""
        return self.finished or bool(self.stop) or self.exits

    def due(self, interval: int | None) -> bool:
        """Whether an action with this `interval` is due after this iteration."""
        return interval is not None and self.progress.iteration % interval == 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Enter the hooks' `phase` contexts."""
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.phase(self, name))
            yield

    def say(self, line: str) -> None:
        """Send a one-line message to the hooks; any rank may call it."""
        for hook in self.hooks:
            hook.on_message(self, line)

    def drain_scalars(self) -> None:
        """Wait for the scalars of all steps so far, and act on them."""
        self._act_on(self._scalars.drain())

    def _train_until_rollback(self) -> None:
        progress, dataset = self.progress, self.run.train_dataset
        position = progress.consumed_samples, progress.skipped_samples
        try:
            with run_batches(self.run, dataset, *position) as batches:
                while not self.over:
                    self._iterate(batches)
            self.drain_scalars()
        except RollBack as answer:
            self._roll_back(answer)

    def _iterate(self, batches: BatchIterator) -> None:
        for hook in self.hooks:
            hook.before_step(self)
        with self.phase(STEP):
            result = self._step(batches)
            # A step of which no token counts has no loss that a mean could take.
            loss = torch.where(result.share > 0, result.loss, torch.nan)
            scalars = torch.stack((loss, self.window.skipped_in_a_row, result.stop))
            arrived = self._scalars.push(self.progress.iteration, scalars)
        self._act_on(arrived)
        for hook in self.hooks:
            hook.after_step(self, result)
        self.exits = self.exits or self.due(self.run.config.train.exit_interval)

    def _step(self, batches: BatchIterator) -> StepResult:
        run, progress = self.run, self.progress
        consumed = progress.consumed_samples
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        self._seed_generators(consumed)
        run.sent.take()  # do not count bytes of evaluations and reports
        result = train_step(
            run.model,
            run.optimizer,
            run.training_objective,
            list(run.with_reference(batch.to(run.device) for batch in microbatches)),
            run.learning_rate.rate(progress.iteration, consumed),
            run.data_parallel,
            run.pipeline,
            run.histories,
            stop=max((hook.stop_reason() for hook in self.hooks), default=0.0),
        )
        self.sent = run.sent.take()
        self.window.add(result)
        progress.advance(batches.consumed_samples)
        return result

    def _act_on(self, arrived: tuple[int, list[float]] | None) -> None:
        if arrived is None:
            return
        iteration, values = arrived
        scalars = HostScalars(iteration, *values)
        self.stop = self.stop or scalars.stop
        for hook in self.hooks:
            hook.on_scalars(self, scalars)

    def _seed_generators(self, consumed_samples: int) -> None:
        groups, seed = self.run.groups, self.run.config.train.seed
        same_stage = groups.data_parallel.rank(), groups.tensor_parallel.rank()
        seed_generators(seed, consumed_samples, *same_stage, groups.pipeline_parallel.rank())

    def _roll_back(self, answer: RollBack) -> None:
        """Go back to before the spike and skip the data since."""
        progress = self.progress
        position = progress.consumed_samples + progress.skipped_samples
        rollbacks = progress.rollbacks + 1
        self.checkpoints.rewind(answer.checkpoint)
        self._scalars = AsyncScalars()  # scalars in flight belong to undone steps
        progress.skipped_samples = position - progress.consumed_samples
        progress.rollbacks = rollbacks
        self._fit_datasets()
        for hook in self.hooks:
            hook.on_rollback(self)
        skipped = f"{progress.skipped_samples} samples are skipped"
        self.say(f" {answer.spike}: back at iteration {progress.iteration}, from which {skipped}")

    def _fit_datasets(self) -> None:
        """Fit the datasets to the remaining steps, whose batch size may have changed."""
        progress = self.progress
        self.run = resize_datasets(self.run, progress.iteration, progress.consumed_samples)

    def _report_stop(self) -> int:
        """Say why and where; the exit code."""
        checkpoint, launch = self.run.config.checkpoint, DistEnv.from_environment(os.environ)
        self.say(describe_stop(self.stop, checkpoint, launch, self.progress.iteration))
        return exit_code(self.stop, checkpoint.resumes)
