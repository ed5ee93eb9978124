"""The training loop: steps, reports, evaluation, checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fp8lm.comm import Wire, all_gather_scalars
from fp8lm.data.batches import BatchIterator
from fp8lm.layers.operand_amax import known_amaxes
from fp8lm.training.build import Run
from fp8lm.training.checkpoint import check_save_folder
from fp8lm.training.checkpointing import load_run, save_run
from fp8lm.training.progress import Progress, Stopwatch, Window
from fp8lm.training.report import Reporter
from fp8lm.training.step import Batch, StepResult, evaluate, seed_generators, train_step


class Trainer:
    """Runs `run` from where its checkpoint left off to its end."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.window = Window(run.device)
        self.progress = Progress()
        if run.config.checkpoint.save is not None:
            check_save_folder(run.config.checkpoint.save)  # now, not after hours of training
        load_run(run, self.window, self.progress)
        self._saved_iteration = self.progress.iteration
        self._stopwatch = Stopwatch(self.progress)

    def train(self) -> None:
        """Train to the end, or to `train.exit_interval`; saves before returning."""
        config, progress = self.run.config, self.progress
        batches = self._batches(self.run.datasets[0], progress.consumed_samples)
        with Reporter(self.run, progress.iteration) as self._reporter:
            if self._finished:
                done = f"{progress.iteration} iterations done"
                self._reporter.log_text(f" nothing left to do: {done}")
                return
            if progress.iteration == 0:
                self._evaluate("validation")  # where the curve starts
            self._stopwatch = Stopwatch(progress)
            while progress.consumed_samples < self.run.total_samples:
                result = self._step(batches)
                if self._due(config.logging.log_interval):
                    self._report(result)
                if self._due(config.train.eval_interval) or self._finished:
                    self._evaluate("validation")
                if self._due(config.checkpoint.save_interval):
                    self._save()
                if self._due(config.train.exit_interval):
                    break
            if self._finished:
                self._evaluate("test")
            self._save()

    @property
    def _finished(self) -> bool:
        return self.progress.consumed_samples >= self.run.total_samples

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.iteration % interval == 0

    def _step(self, batches: BatchIterator) -> StepResult:
        run, progress = self.run, self.progress
        consumed = progress.consumed_samples
        microbatches = batches.next(run.batch_size.num_microbatches(consumed))
        self._seed_generators(consumed)
        run.sent.take()  # what evaluations and reports sent is no step's
        result = train_step(
            run.model,
            run.optimizer,
            self._on_device(microbatches),
            run.learning_rate.rate(consumed),
            run.replicas,
            run.pipeline,
        )
        self._sent = run.sent.take()
        self.window.add(result)
        progress.advance(batches.consumed_samples)
        self._reporter.advance()
        return result

    def _seed_generators(self, consumed_samples: int) -> None:
        groups, seed = self.run.groups, self.run.config.train.seed
        ranks = groups.data_parallel.rank(), groups.tensor_parallel.rank()
        ranks += (groups.pipeline_parallel.rank(),)
        seed_generators(seed, consumed_samples, *ranks)

    def _report(self, result: StepResult) -> None:
        """Log what happened since the last report: the loop's only host synchronisation."""
        progress, window = self.progress, self.window.read()
        lr = self.run.learning_rate.rate(progress.consumed_samples - progress.batch_size)
        lap = self._stopwatch.lap(progress)
        self._reporter.log_training(progress, lap, window, result.grad_norm.item(), lr, self._sent)
        self._stop_if_stuck(int(window["skipped_in_a_row"]))

    def _stop_if_stuck(self, skipped_in_a_row: int) -> None:
        limit = self.run.config.train.max_consecutive_skips
        if skipped_in_a_row >= limit:
            self._save()
            raise RuntimeError(
                f"{skipped_in_a_row} steps in a row were skipped on non-finite values "
                f"(train.max_consecutive_skips={limit}); weights are those before the first of them"
            )

    def _evaluate(self, split: str) -> None:
        dataset = self.run.datasets[("train", "validation", "test").index(split)]
        if dataset is None:
            return
        config = self.run.config.train
        with self._stopwatch.paused():
            batches = self._batches(dataset, 0)
            per_step = self.run.groups.data_parallel.size() * config.micro_batch_size
            self.run.replicas.wait_for_weights()
            partition = self.run.optimizer.partition
            with known_amaxes(self.run.weights.values(), partition):
                count = config.eval_iters * config.global_batch_size // per_step
                loss = self._mean_over_ranks(self._loss(batches, count)).item()
        self._reporter.log_evaluation(split, self.progress.iteration, loss)

    def _loss(self, batches: BatchIterator, count: int) -> Tensor:
        """Mean over `count` micro-batches without dropout, 0 where a pipeline has no loss."""
        run = self.run
        if run.pipeline is not None:
            run.model.eval()
            return run.pipeline.evaluate(self._on_device(batches.next(count)))
        losses = [evaluate(run.model, self._on_device(batches.next(1))) for _ in range(count)]
        return torch.stack(losses).mean()

    def _mean_over_ranks(self, loss: Tensor) -> Tensor:
        wire, groups = Wire("grads", "fp32", self.run.sent), self.run.groups
        losses = all_gather_scalars(loss[None], groups.world, wire)
        return losses.mean() * groups.pipeline_parallel.size()

    def _save(self) -> None:
        """Save unless this iteration is saved already."""
        folder = self.run.config.checkpoint.save
        if folder is None or self._saved_iteration == self.progress.iteration:
            return
        with self._stopwatch.paused():
            save_run(self.run, self.window, self.progress)
        self._saved_iteration = self.progress.iteration
        self._reporter.log_saved(self.progress.iteration, folder)

    def _batches(self, dataset: Dataset, consumed_samples: int) -> BatchIterator:
        group = self.run.groups.data_parallel
        return BatchIterator(
            dataset,
            micro_batch_size=self.run.config.train.micro_batch_size,
            rank=group.rank(),
            world_size=group.size(),
            consumed_samples=consumed_samples,
            num_workers=self.run.config.data.num_workers,
            pin_memory=self.run.device.type == "cuda",
        )

    def _on_device(self, microbatches: list[Batch]) -> list[Batch]:
        return [
            {key: value.to(self.run.device, non_blocking=True) for key, value in batch.items()}
            for batch in microbatches
        ]
