"""How many samples and steps a run has, and whether its batches divide."""

from __future__ import annotations

from fp8lm.config import Config, TrainConfig
from fp8lm.numerics import accumulation_risk, format_by_name
from fp8lm.optim.schedule import BatchSize
from fp8lm.runtime.errors import InputError


def check_batches(config: Config, replicas: int) -> None:
    """Raise `InputError` unless every step's batch divides over `replicas` and their stages."""
    train = config.train
    share = train.micro_batch_size * replicas
    of = f"train.micro_batch_size = {train.micro_batch_size} times {replicas} data-parallel ranks"
    if train.global_batch_size % share:
        raise InputError(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by {of}: use a "
            f"multiple of {share}, {_fitting(train, replicas)}or another number of processes"
        )
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.num_chunks(config.model.num_layers) > 1:
        share, of = share * stages, f"{of} times {stages} pipeline stages"
        if train.global_batch_size % share:
            raise InputError(
                f"train.global_batch_size = {train.global_batch_size} is not divisible by {of}, "
                "which the interleaved schedule needs"
            )
    rampup = train.rampup_batch_size or (share, share, 0)
    start, increment, _ = rampup
    if start % share or increment % share:
        raise InputError(
            f"train.rampup_batch_size = {list(rampup)}: start and increment must "
            f"be multiples of {of}"
        )


def _fitting(train: TrainConfig, replicas: int) -> str:
    """The largest smaller micro-batch that divides the batch, as a cure; empty without one."""
    each, rest = divmod(train.global_batch_size, replicas)
    sizes = [] if rest else [n for n in range(1, train.micro_batch_size) if each % n == 0]
    return f"train.micro_batch_size={sizes[-1]}, " if sizes else ""


def dataset_sizes(
    config: Config, iteration: int = 0, consumed_samples: int = 0
) -> tuple[int, int, int]:
    """Samples to build of training, validation and test, as Megatron-LM counts them.

    They decide how many epochs megatron-core shuffles, and with that the order of all samples.
    A run of `train_iters` whose batch has changed reads `consumed_samples` until `iteration`, and
    today's batches after it. A split without a share of the data has 0.
    """
    train = config.train
    batch_size = BatchSize(train, data_parallel_size=1)
    samples = train.train_samples
    if samples is None:
        _, samples = end_of_run(train, batch_size, iteration, consumed_samples)
    iterations, _ = end_of_run(train, batch_size)
    evaluation = train.eval_iters * train.global_batch_size
    evaluations = iterations // train.eval_interval + 1
    shares = [float(share) for share in config.data.split.split(",")] + [0.0, 0.0]
    return samples, evaluations * evaluation * (shares[1] > 0), evaluation * (shares[2] > 0)


def end_of_run(
    train: TrainConfig, batch_size: BatchSize, iteration: int = 0, consumed_samples: int = 0
) -> tuple[int, int]:
    """Iterations and samples at the end of the run that has got to `iteration`.

    `train_iters` counts iterations, whatever batches they had. `train_samples` drops a partial last
    batch.
    """
    size = train.global_batch_size
    if train.train_iters is not None:
        left = max(0, train.train_iters - iteration)
        return iteration + left, consumed_samples + left * size
    while not is_over(train, batch_size, iteration, consumed_samples):
        size = batch_size.global_batch_size(consumed_samples)
        if size == train.global_batch_size:  # the ramp-up is over
            left = (_train_samples(train) - consumed_samples) // size
            return iteration + left, consumed_samples + left * size
        iteration, consumed_samples = iteration + 1, consumed_samples + size
    return iteration, consumed_samples


def describe_changed_batches(
    train: TrainConfig, iteration: int, consumed_samples: int
) -> str | None:
    """What is left of a run of `train_iters` whose batch has changed; None if it has not."""
    batch = train.global_batch_size
    if train.train_iters is None or consumed_samples == iteration * batch:
        return None
    left = train.train_iters - iteration
    return (
        f" note: the batch has changed: {iteration} iterations read {consumed_samples} samples, "
        f"the {left} that are left read {left * batch} in batches of {batch} "
        "(train.global_batch_size); schedules count iterations"
    )


def _train_samples(train: TrainConfig) -> int:
    """`train.train_samples`, which the config has where `train.train_iters` is null."""
    if train.train_samples is None:
        raise ValueError("neither train.train_iters nor train.train_samples is set")
    return train.train_samples


def is_over(
    train: TrainConfig, batch_size: BatchSize, iteration: int, consumed_samples: int
) -> bool:
    """Whether the run has no step left after `iteration`, or no samples for a whole one."""
    if train.train_iters is not None:
        return iteration >= train.train_iters
    size = batch_size.global_batch_size(consumed_samples)
    return consumed_samples + size > _train_samples(train)


def accumulation_risks(config: Config, num_replicas: int) -> list[str]:
    """What a step's micro-batches lose in the format of their sum, where that is too much."""
    train, dtype = config.train, config.precision.main_grads_dtype
    count = train.global_batch_size // (train.micro_batch_size * num_replicas)
    risk = accumulation_risk(format_by_name(dtype), count) if count > 1 else None
    return [] if risk is None else [risk]
