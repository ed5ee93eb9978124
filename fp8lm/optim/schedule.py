"""Schedules of learning rate and batch size as functions of the run's position.

The learning rate is megatron-core's. Its ramp-up of the batch has another interface since 0.18 than
before, so that is written out here.

Functions need no state in a checkpoint. The position has the unit of the run's length: iterations
with `train_iters`, consumed samples with `train_samples`, so that the schedule does not move if a
run resumes with another batch size. Megatron-core is imported on use: its import takes seconds,
which checks before a start need not wait for.
"""

from __future__ import annotations

from types import SimpleNamespace

from fp8lm.config import OptimizerConfig, SchedulerConfig, TrainConfig
from fp8lm.runtime.quiet import quiet_megatron


class LearningRate:
    """`rate(iteration, consumed_samples)`, from the sections optimizer, scheduler and train."""

    def __init__(
        self, optimizer: OptimizerConfig, scheduler: SchedulerConfig, train: TrainConfig
    ) -> None:
        with quiet_megatron():
            from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        # Iterations count as Megatron-LM counts them: in samples of one batch, today's.
        self._per_iteration = train.global_batch_size if train.train_samples is None else None

        def samples(iterations: int | None, samples: int | None) -> int | None:
            return samples if iterations is None else iterations * train.global_batch_size

        decay = samples(scheduler.lr_decay_iters, scheduler.lr_decay_samples)
        decay = decay or samples(train.train_iters, train.train_samples)
        warmup: float | None
        warmup = scheduler.lr_warmup_samples or samples(scheduler.lr_warmup_iters, None)
        if scheduler.lr_warmup_fraction is not None:
            warmup = scheduler.lr_warmup_fraction * (decay or 0)
        wsd_decay = samples(scheduler.lr_wsd_decay_iters, scheduler.lr_wsd_decay_samples)
        self._scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=[{}]),
            init_lr=scheduler.lr_warmup_init,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=decay,
            lr_decay_style=scheduler.lr_decay_style,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=decay,
            wd_incr_style="constant",
            wsd_decay_steps=wsd_decay,
            lr_wsd_decay_style=scheduler.lr_wsd_decay_style,
        )

    def rate(self, iteration: int, consumed_samples: int) -> float:
        """The learning rate of the step after `iteration` steps with `consumed_samples`."""
        if self._per_iteration is None:
            self._scheduler.num_steps = consumed_samples
        else:
            self._scheduler.num_steps = iteration * self._per_iteration
        return self._scheduler.get_lr({})


class BatchSize:
    """`global_batch_size(consumed_samples)`, constant or ramping up, from config section train."""

    def __init__(self, train: TrainConfig, data_parallel_size: int) -> None:
        self._stride = train.micro_batch_size * data_parallel_size
        self._final, self._rampup = train.global_batch_size, train.rampup_batch_size

    def global_batch_size(self, consumed_samples: int) -> int:
        """Samples, over all data-parallel ranks, of the step after `consumed_samples`."""
        if self._rampup is None:
            return self._final
        return _ramp_up(consumed_samples, self._final, self._rampup)

    def num_microbatches(self, consumed_samples: int) -> int:
        """Micro-batches of each rank in that step."""
        return self.global_batch_size(consumed_samples) // self._stride


def _ramp_up(consumed: int, final: int, rampup: tuple[int, int, int]) -> int:
    """Megatron's: from `start` to `final` in steps of `increment`, equally long in samples."""
    start, increment, samples = rampup
    num_increments = (final - start) // increment
    if consumed > samples or not num_increments * samples:
        return final
    return start + increment * int(consumed / (samples / num_increments))
