"""Lengths and sizes are Megatron-LM's, and a changed batch changes neither."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core import num_microbatches_calculator

from fp8lm.config import TrainConfig
from fp8lm.optim.schedule import BatchSize
from fp8lm.training.evaluation import first_validation_sample
from fp8lm.training.run_length import dataset_sizes, end_of_run, is_over


def megatron_train_iters(train):
    """`update_train_iters` of Megatron-LM's `megatron/training/training.py`."""
    if train.train_iters:
        return train.train_iters
    if train.rampup_batch_size is None:
        return train.train_samples // train.global_batch_size
    start, increment, ramp_samples = train.rampup_batch_size
    ramp = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)
    if ramp is None:
        pytest.skip("megatron-core has had no ramp-up to compare with since 0.18")
    calculator = ramp(
        rank=-1,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        start_global_batch_size=start,
        batch_size_increment=increment,
        ramup_samples=ramp_samples,
    )
    iterations = consumed_samples = 0
    while consumed_samples <= ramp_samples:
        calculator.update(consumed_samples, consistency_check=False)
        consumed_samples += calculator.get_current_global_batch_size()
        iterations += 1
    return iterations + (train.train_samples - consumed_samples) // train.global_batch_size


def megatron_sizes(train):
    """`get_train_valid_test_num_samples` of the same file."""
    train_iters = megatron_train_iters(train)
    train_samples = train.train_samples or train_iters * train.global_batch_size
    eval_iters = (train_iters // train.eval_interval + 1) * train.eval_iters
    return (
        train_samples,
        eval_iters * train.global_batch_size,
        train.eval_iters * train.global_batch_size,
    )


def train_config(**changes):
    return TrainConfig(**{"micro_batch_size": 2, "global_batch_size": 8, **changes})


RAMP = {"rampup_batch_size": (2, 2, 90)}  # in full at 90, after its 24th step; 4 and 6 between


@pytest.mark.parametrize(
    "changes",
    [
        *({"train_iters": n, "eval_interval": 5, "eval_iters": 3} for n in (1, 4, 5, 6, 10)),
        *({"train_samples": n, "eval_interval": 5, "eval_iters": 3} for n in (8, 9, 39, 40, 47)),
        *({"train_samples": n, "eval_interval": 7, **RAMP} for n in (98, 99, 105, 106, 107, 1000)),
        {"train_samples": 100, "rampup_batch_size": (2, 2, 91)},  # increments of 30 1/3
        {"train_samples": 400, "rampup_batch_size": (4, 4, 1)},
    ],
)
def test_sizes_are_those_of_megatron(changes, tiny_config):
    train = {"train_iters": None, "global_batch_size": 8, "eval_interval": 1000, **changes}
    config = tiny_config({"train": train, "data": {"split": "90,5,5"}, "scheduler": NO_WARMUP})
    assert dataset_sizes(config) == megatron_sizes(config.train)
    iterations, samples = end_of_run(config.train, BatchSize(config.train, 1))
    assert iterations == megatron_train_iters(config.train)
    assert samples <= dataset_sizes(config)[0] < samples + 8


NO_WARMUP = {"lr_warmup_iters": 0}


def test_a_split_without_a_share_has_no_samples(tiny_config):
    assert dataset_sizes(tiny_config({"data": {"split": "90,0,10"}})) == (32, 0, 4)
    assert dataset_sizes(tiny_config({"data": {"split": "1"}})) == (32, 0, 0)


def test_a_run_that_ends_within_its_ramp_up_reads_no_more_samples_than_it_has():
    # Megatron-LM starts the steps at 8 and at 10 as well, for which there are no samples.
    train = train_config(train_samples=10, rampup_batch_size=(4, 4, 100))
    assert end_of_run(train, BatchSize(train, 1)) == (2, 8)


@pytest.mark.parametrize(
    "changes", [{"train_iters": 7}, {"train_samples": 61}, {"train_samples": 203, **RAMP}]
)
def test_steps_until_the_end(changes):
    train = train_config(**changes)
    size, iteration, consumed = BatchSize(train, 1), 0, 0
    while not is_over(train, size, iteration, consumed):
        assert end_of_run(train, size, iteration, consumed) == end_of_run(train, size)
        iteration, consumed = iteration + 1, consumed + size.global_batch_size(consumed)
    assert (iteration, consumed) == end_of_run(train, size)


def test_iterations_stay_iterations_and_samples_samples_when_the_batch_changes():
    train = train_config(train_iters=10)  # 5 of them with batches of 4
    assert end_of_run(train, BatchSize(train, 1), 5, 20) == (10, 60)
    assert end_of_run(train, BatchSize(train, 1), 10, 40) == (10, 40)
    assert end_of_run(train, BatchSize(train, 1), 12, 48) == (12, 48)  # made shorter
    train = train_config(train_samples=45)
    assert end_of_run(train, BatchSize(train, 1), 5, 20) == (8, 44)


@pytest.mark.parametrize(
    ("iteration", "first"), [(0, 0), (5, 0), (10, 24), (15, 48), (17, 72), (20, 72), (25, 0)]
)
def test_evaluations_that_follow_on_each_other(iteration, first):
    # Megatron-LM's evaluations of iterations 5, 10, 15 and of the end, at 17, have 24 samples each.
    train = train_config(train_iters=17, eval_interval=5, eval_iters=3, eval_new_samples=True)
    assert first_validation_sample(train, iteration, 4 * 24 + 7) == first
    same = train.model_copy(update={"eval_new_samples": False})
    assert first_validation_sample(same, iteration, 4 * 24 + 7) == 0


class Recording(torch.utils.data.Dataset):
    """A dataset that knows which of its samples were read."""

    def __init__(self, dataset):
        self.dataset, self.read = dataset, []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.read.append(index)
        return self.dataset[index]


def test_evaluations_read_on_where_the_one_before_ended(tiny_config, train_run, folders):
    read = []

    def record(trainer):
        train, validation, test = trainer.run.datasets
        recording = Recording(validation)
        datasets = train, recording, test
        trainer.run = replace(trainer.run, datasets=datasets)
        read.append(recording.read)

    def run(**train):
        train = {"train_iters": 5, "eval_interval": 2, "eval_new_samples": True, **train}
        train_run(tiny_config(folders("run"), {"train": train}), record)

    run(exit_interval=3)
    run()
    begun, resumed = read  # of iterations 0 and 2; of 4 and of the end
    assert begun == [0, 1, 2, 3] * 2
    assert resumed == [4, 5, 6, 7, 8, 9, 10, 11]
