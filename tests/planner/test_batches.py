"""Steps and tokens of a run; how long its pipeline is idle."""

from __future__ import annotations

import pytest

from fp8lm.planner.batches import plan_batches
from fp8lm.runtime.errors import InputError
from tests.planner.tiny import INTERLEAVED, PP2, tiny


def test_arithmetic():
    batches = plan_batches(tiny(), 2)
    assert (batches.micro_batch_size, batches.num_microbatches, batches.num_replicas) == (2, 4, 2)
    assert (batches.global_batch_size, batches.tokens_per_step) == (16, 256)
    assert (batches.iterations, batches.samples, batches.tokens, batches.bubble) == (2, 32, 512, 0)


def test_rampup():
    """8 samples for the first 16, then 16: 8, 8, 16."""
    samples = {"train_iters": None, "train_samples": 32, "rampup_batch_size": [8, 8, 16]}
    batches = plan_batches(tiny(train=samples), 2)
    assert (batches.iterations, batches.samples, batches.global_batch_size) == (3, 32, 16)


@pytest.mark.parametrize(
    ("parallel", "bubble"),
    [
        (PP2, 1 / (4 + 1)),  # (p-1) / (m + p-1)
        (PP2 | INTERLEAVED, 1 / (2 * 4 + 1)),  # v = 2 chunks
        (PP2 | {"pipeline_schedule": "zb-h1"}, 1 / (3 * 4 + 1)),
    ],
)
def test_bubble(parallel, bubble):
    assert plan_batches(tiny(parallel=parallel), 2).bubble == pytest.approx(bubble)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"global_batch_size = 16 is not divisible by .* 3 data-"):
        plan_batches(tiny(), 3)
