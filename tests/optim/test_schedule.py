"""Learning rates and batch sizes at points computed by hand."""

from __future__ import annotations

import math

import pytest

from fp8lm.config import OptimizerConfig, SchedulerConfig, TrainConfig
from fp8lm.optim.schedule import BatchSize, LearningRate

GLOBAL_BATCH = 4


def rates(steps, *, lr=1.0, min_lr=0.1, train=None, **scheduler):
    """Learning rates of the steps numbered `steps` (from 0) of a run of 100 iterations."""
    train = TrainConfig(
        micro_batch_size=2, global_batch_size=GLOBAL_BATCH, **(train or {"train_iters": 100})
    )
    rate = LearningRate(OptimizerConfig(lr=lr, min_lr=min_lr), SchedulerConfig(**scheduler), train)
    return [rate.rate(step, step * GLOBAL_BATCH) for step in steps]


COSINE = [1.0, 0.1 + 0.9 * (0.5 + 0.25 * math.sqrt(2)), 0.55, 0.1]
WSD = dict(lr_decay_style="WSD", lr_wsd_decay_iters=20)


@pytest.mark.parametrize(
    ("scheduler", "steps", "expected"),
    [
        (dict(lr_decay_style="constant"), [0, 1, 50, 99], [1.0, 1.0, 1.0, 1.0]),
        (dict(lr_decay_style="cosine"), [0, 25, 50, 100], COSINE),
        (dict(lr_decay_style="linear"), [0, 25, 50, 100], [1.0, 0.775, 0.55, 0.1]),
        (dict(lr_decay_style="cosine", lr_decay_iters=50), [25, 50, 51, 99], [0.55, 0.1, 0.1, 0.1]),
        # warm-up to step 10, then the decay over what is left
        (dict(lr_warmup_iters=10), [0, 1, 5, 10, 55, 100], [0.0, 0.1, 0.5, 1.0, 0.55, 0.1]),
        (dict(lr_warmup_fraction=0.1), [0, 1, 5, 10, 55, 100], [0.0, 0.1, 0.5, 1.0, 0.55, 0.1]),
        (dict(lr_warmup_iters=10, lr_warmup_init=0.5), [0, 5, 10], [0.5, 0.75, 1.0]),
        (dict(lr_decay_style="constant", lr_warmup_iters=4), [0, 2, 4, 90], [0.0, 0.5, 1.0, 1.0]),
        (
            dict(lr_decay_style="inverse-square-root", lr_warmup_iters=4),
            [2, 4, 16, 64],
            [0.5, 1.0, 0.5, 0.25],
        ),
        (
            dict(**WSD, lr_wsd_decay_style="linear", lr_warmup_iters=10),
            [5, 10, 80, 90, 95, 100],
            [0.5, 1.0, 1.0, 0.55, 0.325, 0.1],
        ),
        (dict(**WSD, lr_wsd_decay_style="cosine"), [0, 80, 90, 100], [1.0, 1.0, 0.55, 0.1]),
        (
            dict(**WSD, lr_wsd_decay_style="exponential"),
            [80, 90, 100],
            [1.0, 0.1 + 0.9 * (math.sqrt(2) - 1), 0.1],
        ),
        (dict(**WSD, lr_wsd_decay_style="minus_sqrt"), [80, 85, 100], [1.0, 0.55, 0.1]),
    ],
)
def test_learning_rate(scheduler, steps, expected):
    assert rates(steps, **scheduler) == pytest.approx(expected, abs=1e-12)


def test_lengths_in_samples():
    scheduler = dict(lr_warmup_samples=40, lr_decay_samples=400)
    by_samples = rates(range(100), train={"train_samples": 800}, **scheduler)
    assert by_samples == rates(range(100), lr_warmup_iters=10)
    wsd = dict(lr_decay_style="WSD", lr_wsd_decay_samples=80)
    assert rates(range(100), train={"train_samples": 400}, **wsd) == rates(range(100), **WSD)


def test_decay_defaults_to_the_length_of_the_run():
    assert rates([50], train={"train_samples": 400}) == pytest.approx([0.55])
    assert rates([50], train={"train_iters": 50}) == pytest.approx([0.1])


def test_the_unit_of_the_run_is_that_of_the_schedule():
    def rate(train, iteration, consumed):
        train = TrainConfig(micro_batch_size=2, global_batch_size=8, **train)
        return LearningRate(OptimizerConfig(lr=1.0), SchedulerConfig(), train).rate(
            iteration, consumed
        )

    # Half of the run with batches of 4, the other half with batches of 8.
    assert rate({"train_iters": 100}, 50, 50 * 4) == pytest.approx(0.55)
    assert rate({"train_samples": 400}, 50, 50 * 4) == pytest.approx(0.55)


def test_rate_is_a_function_of_the_position_alone():
    forward = rates(range(100), lr_warmup_iters=10)
    backward = rates(reversed(range(100)), lr_warmup_iters=10)
    assert forward == backward[::-1]


def batch_size(data_parallel_size=1, **train):
    train = {"micro_batch_size": 2, "global_batch_size": 8, "train_samples": 1000, **train}
    return BatchSize(TrainConfig(**train), data_parallel_size)


@pytest.mark.parametrize(("data_parallel_size", "microbatches"), [(1, 4), (2, 2), (4, 1)])
def test_constant_batch_size(data_parallel_size, microbatches):
    size = batch_size(data_parallel_size)
    for consumed in (0, 8, 800):
        assert size.global_batch_size(consumed) == 8
        assert size.num_microbatches(consumed) == microbatches


# From 2 by 2 to 8 over 90 samples: three increments of 30 samples each.
@pytest.mark.parametrize(
    ("consumed", "expected"),
    [(0, 2), (28, 2), (30, 4), (58, 4), (60, 6), (88, 6), (90, 8), (92, 8), (900, 8)],
)
def test_ramp_up(consumed, expected):
    size = batch_size(rampup_batch_size=(2, 2, 90))
    size.global_batch_size(500)  # where it was asked before does not matter
    assert size.global_batch_size(consumed) == expected
    assert size.num_microbatches(consumed) == expected // 2


def test_ramp_up_consumes_every_sample_once():
    size, consumed, sizes = batch_size(rampup_batch_size=(4, 2, 40)), 0, []
    while consumed < 60:
        sizes.append(size.global_batch_size(consumed))
        consumed += sizes[-1]
    # 4 until 20 samples, 6 until 40: 0 4 8 12 16 | 20 26 32 38 | 44 ...
    assert sizes == [4] * 5 + [6] * 4 + [8] * 2
