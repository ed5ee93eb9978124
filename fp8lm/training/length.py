"""How many samples and steps a run has, and whether its batches divide."""

from __future__ import annotations

from fp8lm.config import Config, TrainConfig
from fp8lm.errors import InputError
from fp8lm.optim.schedule import BatchSize


def check_batches(config: Config, replicas: int) -> None:
    """Raise `InputError` unless every step's batch divides over `replicas` and their stages."""
    train = config.train
    share = train.micro_batch_size * replicas
    of = f"train.micro_batch_size = {train.micro_batch_size} times {replicas} data-parallel ranks"
    if train.global_batch_size % share:
        raise InputError(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by {of}: use a "
            f"multiple of {share}, or another number of processes"
        )
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.num_chunks(config.model.num_layers) > 1:
        share, of = share * stages, f"{of} times {stages} pipeline stages"
        if train.global_batch_size % share:
            raise InputError(
                f"train.global_batch_size = {train.global_batch_size} is not divisible by {of}, "
                "which the interleaved schedule needs"
            )
    start, increment, _ = train.rampup_batch_size or (share, share, 0)
    if start % share or increment % share:
        raise InputError(
            f"train.rampup_batch_size = {list(train.rampup_batch_size)}: start and increment must "
            f"be multiples of {of}"
        )


def dataset_sizes(config: Config) -> tuple[int, int, int]:
    """Samples of training, validation and test that a run reads; 0 of a split without a share."""
    # A last step may reach beyond the run's samples by less than one batch.
    train = total_samples(config.train) + config.train.global_batch_size
    evaluation = config.train.eval_iters * config.train.global_batch_size
    shares = [float(share) for share in config.data.split.split(",")] + [0.0, 0.0]
    return train, evaluation * (shares[1] > 0), evaluation * (shares[2] > 0)


def total_samples(train: TrainConfig) -> int:
    """Samples of the whole run, over all ranks, from the config section `train`."""
    if train.train_samples is not None:
        return train.train_samples
    return train.train_iters * train.global_batch_size


def total_iterations(train: TrainConfig, batch_size: BatchSize) -> int:
    """Iterations of the whole run; with a ramp-up, counted by going through it."""
    if train.train_iters is not None:
        return train.train_iters
    iterations = samples = 0
    while samples < train.train_samples:
        samples += batch_size.global_batch_size(samples)
        iterations += 1
    return iterations
