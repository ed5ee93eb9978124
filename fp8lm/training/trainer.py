"""The training loop: steps, reports, evaluation, checkpoints, and what can interrupt them."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

from fp8lm.checkpoint.collectives import on_main
from fp8lm.comm.env import DistEnv
from fp8lm.data.batches import BatchIterator
from fp8lm.runtime.errors import LockLost, RunFailed
from fp8lm.runtime.run_lock import RunLocks
from fp8lm.runtime.streams import say
from fp8lm.training.build import Run, resize_datasets
from fp8lm.training.checkpointing import RunCheckpoints
from fp8lm.training.evaluation import (
    evaluation_loss,
    first_validation_sample,
    on_device,
    run_batches,
)
from fp8lm.training.events import AsyncScalars
from fp8lm.training.progress import MetricAccumulator, Progress, Stopwatch
from fp8lm.training.report import Reporter
from fp8lm.training.resume_command import command_to_go_on, describe_interruption
from fp8lm.training.run_length import is_over
from fp8lm.training.spikes import LossSpike, LossSpikeDetector, RollBack
from fp8lm.training.step import StepResult, seed_generators, train_step
from fp8lm.training.stopping import LOCK_LOST, StopRequests, describe, exit_code
from fp8lm.training.watchdog import Watchdog


class Trainer:
    """Runs `run` from where its checkpoint left off to its end; `locks` are of its folders."""

    def __init__(self, run: Run, locks: RunLocks | None = None) -> None:
        train = run.config.train
        self._locks = RunLocks() if locks is None else locks
        self.run = run
        self.window = MetricAccumulator(run.device)
        self.progress = Progress()
        self.losses = LossSpikeDetector(train.loss_spike_threshold, train.loss_spike_patience)
        self._open_reporter: Reporter | None = None
        state = self.window, self.progress, self.losses
        self.checkpoints = RunCheckpoints(run, *state, self._say, self._locks)
        self.checkpoints.load()
        self._note_other_batches()
        self._fit_datasets()
        self._stopwatch = Stopwatch(self.progress)
        self._numbers = AsyncScalars()
        self._stop, self._exits = 0.0, False

    def train(self) -> int:
        """Train to the end, or to where something asks to stop; saves before returning.

        Returns the exit code: 0, or that of `stopping` if a signal or the time asked to stop. A
        KeyboardInterrupt saves nothing, and says what there is.
        """
        try:
            return self._train()
        except KeyboardInterrupt as interrupt:
            config, iteration = self.run.config.checkpoint, self.progress.iteration
            launch = DistEnv.from_environment(os.environ)
            interrupt.args = (describe_interruption(config, launch, iteration),)
            raise

    def _train(self) -> int:
        run, config = self.run, self.run.config.train
        launch = DistEnv.from_environment(os.environ)
        with ExitStack() as stack:
            on_main(run.groups.saving, self._locks.verify)
            self._open_reporter = stack.enter_context(
                Reporter(run, self.progress, self._locks.held)
            )
            self._requests = stack.enter_context(StopRequests(config, launch, self._locks))
            self._watchdog = stack.enter_context(Watchdog(run.groups, config.slow_step_factor))
            if self._finished:
                self._say(f" nothing left to do: {self.progress.iteration} iterations done")
                return 0
            if self.progress.iteration == 0:
                self._evaluate("validation")  # where the curve starts
            while not (self._finished or self._stop or self._exits):
                self._go_on()
            if self._stop == LOCK_LOST:
                self._locks.verify()  # the main rank knows who has them
                raise LockLost("another run has taken the folders of this one over")
            if self._finished:
                self._evaluate("test")
            run.data_parallel.finish_param_sync()  # collectives in flight end before their groups
            self._save_last()
            if self._finished or not self._stop:
                return 0
            return self._stopped()

    def _stopped(self) -> int:
        """Say why and where; the exit code."""
        checkpoint = self.run.config.checkpoint
        where = f"stopped after iteration {self.progress.iteration}"
        if checkpoint.save is None:
            where += "; nothing is saved without checkpoint.save"
        elif not checkpoint.resumes:
            launch = DistEnv.from_environment(os.environ)
            where += f"; to go on: {command_to_go_on(checkpoint, launch)}"
        self._say(f" {describe(self._stop)}: {where}")
        return exit_code(self._stop, checkpoint.resumes)

    @property
    def _finished(self) -> bool:
        run, progress = self.run, self.progress
        position = progress.iteration, progress.consumed_samples
        return is_over(run.config.train, run.batch_size, *position)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.iteration % interval == 0

    @property
    def _reporter(self) -> Reporter:
        if self._open_reporter is None:
            raise RuntimeError("the training has not started")
        return self._open_reporter

    def _go_on(self) -> None:
        """Train until the end, a stop, or a loss spike, from which it rolls back."""
        progress = self.progress
        dataset = self.run.train_dataset
        try:
            with run_batches(
                self.run, dataset, progress.consumed_samples, progress.skipped_samples
            ) as batches:
                self._stopwatch = Stopwatch(progress)
                while not (self._finished or self._stop or self._exits):
                    self._iterate(batches)
            self._look_at(self._numbers.drain())
        except RollBack as answer:
            self._roll_back(answer)

    def _iterate(self, batches: BatchIterator) -> None:
        """One step, and what is due after it."""
        config = self.run.config
        result = self._step(batches)
        if self._due(config.logging.log_interval):
            self._report(result)
        if self._due(config.train.eval_interval) or self._finished:
            self._evaluate("validation")
        if self._due(config.checkpoint.save_interval):
            self._save()
        self.checkpoints.tell()
        self._exits = self._due(config.train.exit_interval)

    def _step(self, batches: BatchIterator) -> StepResult:
        run, progress = self.run, self.progress
        consumed = progress.consumed_samples
        with self._watchdog.step(progress.iteration + 1):
            microbatches = batches.next(run.batch_size.num_microbatches(consumed))
            self._seed_generators(consumed)
            run.sent.take()  # what evaluations and reports sent is no step's
            result = train_step(
                run.model,
                run.optimizer,
                on_device(microbatches, run.device),
                run.learning_rate.rate(progress.iteration, consumed),
                run.data_parallel,
                run.pipeline,
                stop=self._requests.reason,
                per_token=run.config.train.calculate_per_token_loss,
            )
            self._sent = run.sent.take()
            self.window.add(result)
            progress.advance(batches.consumed_samples)
            self._reporter.advance()
            # A step of which no token counts has no loss that a mean could take.
            loss = torch.where(result.share > 0, result.loss, torch.nan)
            numbers = torch.stack((loss, self.window.skipped_in_a_row, result.stop))
            arrived = self._numbers.push(progress.iteration, numbers)
        self._look_at(arrived)
        return result

    def _look_at(self, numbers: tuple[int, list[float]] | None) -> None:
        """React to a step's loss, the skipped steps until it, and why to stop."""
        if numbers is None:
            return
        iteration, (loss, skipped_in_a_row, stop) = numbers
        self._stop = self._stop or stop
        self._stop_if_stuck(int(skipped_in_a_row))
        try:
            self.losses.add(iteration, loss)
        except LossSpike as spike:
            self._answer(spike)

    def _seed_generators(self, consumed_samples: int) -> None:
        groups, seed = self.run.groups, self.run.config.train.seed
        same_stage = groups.data_parallel.rank(), groups.tensor_parallel.rank()
        seed_generators(seed, consumed_samples, *same_stage, groups.pipeline_parallel.rank())

    def _report(self, result: StepResult) -> None:
        """Log what happened since the last report: on a GPU the loop's only wait for the device."""
        progress, window = self.progress, self.window.read()
        before = progress.iteration - 1, progress.consumed_samples - progress.batch_size
        lr = self.run.learning_rate.rate(*before)
        interval = self._stopwatch.interval(progress)
        self._reporter.log_training(
            progress, interval, window, result.grad_norm.item(), lr, self._sent
        )

    def _stop_if_stuck(self, skipped_in_a_row: int) -> None:
        limit = self.run.config.train.max_consecutive_skips
        if skipped_in_a_row >= limit:
            self._save_last()
            raise RunFailed(
                f"{skipped_in_a_row} steps in a row were skipped on non-finite values "
                f"(train.max_consecutive_skips={limit}); weights are those before the first of them"
            )

    def _evaluate(self, split: str) -> None:
        dataset = self.run.datasets[("train", "validation", "test").index(split)]
        if dataset is None:
            return
        train, iteration, first = self.run.config.train, self.progress.iteration, 0
        if split == "validation":
            first = first_validation_sample(train, iteration, len(dataset))
        with self._stopwatch.paused(), self._watchdog.phase("evaluation"):
            loss = evaluation_loss(self.run, dataset, first)
        self._reporter.log_evaluation(split, iteration, loss)

    def _save(self) -> None:
        self._look_at(self._numbers.drain())  # a checkpoint knows of all steps before it
        with self._stopwatch.paused(), self._watchdog.phase("saving a checkpoint"):
            self.checkpoints.save()

    def _save_last(self) -> None:
        with self._watchdog.phase("saving the last checkpoint"):
            self.checkpoints.finish()

    def _answer(self, spike: LossSpike) -> None:
        """Raise `RollBack`, or go on where there is nothing to go back to.

        `RunFailed` if it would be once too often.
        """
        limit = self.run.config.train.max_rollbacks
        if self.progress.rollbacks >= limit:
            self.checkpoints.wait()  # the process ends without the thread that is writing
            raise RunFailed(f"{spike}, after {limit} rollbacks (train.max_rollbacks): stopped")
        checkpoint = self.checkpoints.find_before(spike.first)
        if checkpoint is not None:
            raise RollBack(spike, checkpoint)
        self._say(f" warning: {spike}, and no checkpoint before it: going on")
        self.losses.forget()

    def _roll_back(self, answer: RollBack) -> None:
        """Go back to before the spike and skip the data since."""
        progress = self.progress
        position = progress.consumed_samples + progress.skipped_samples
        rollbacks = progress.rollbacks + 1
        self.checkpoints.rewind(answer.checkpoint)
        self._numbers = AsyncScalars()  # a number in flight is of the steps that are undone
        progress.skipped_samples = position - progress.consumed_samples
        progress.rollbacks = rollbacks
        self._fit_datasets()
        self._reporter.rewind(progress)
        skipped = f"{progress.skipped_samples} samples are skipped"
        self._say(f" {answer.spike}: back at iteration {progress.iteration}, from which {skipped}")

    def _fit_datasets(self) -> None:
        """Have data for the steps that are left, whose batch may not be that of those done."""
        progress = self.progress
        self.run = resize_datasets(self.run, progress.iteration, progress.consumed_samples)

    def _note_other_batches(self) -> None:
        """Say what is left of a run measured in iterations whose batch has changed."""
        train, done = self.run.config.train, self.progress
        if train.train_iters is None or self._finished:
            return
        batch = train.global_batch_size
        if done.consumed_samples != done.iteration * batch:
            left = train.train_iters - done.iteration
            self._say(
                f" note: the batch has changed: {done.iteration} iterations read "
                f"{done.consumed_samples} samples, the {left} that are left read {left * batch} in "
                f"batches of {batch} (train.global_batch_size); schedules count iterations"
            )

    def _say(self, line: str) -> None:
        """Print a line, on the main rank."""
        if self._open_reporter is not None:
            self._open_reporter.log_text(line)
        elif self.run.groups.is_main:
            say(line)
