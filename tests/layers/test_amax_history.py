"""Scales from the amaxes of earlier steps, against their algorithm in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.config import PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.amax_history import AmaxHistories, DelayedScale
from fp8lm.layers.quantizer import Quantizer
from fp8lm.numerics import E4M3, E5M2

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
KEEP, SKIP = torch.tensor(False), torch.tensor(True)


def delayed(fmt=E4M3):
    return Quantizer(fmt, KERNELS, known_scale=DelayedScale())


def histories(quantizers, share=torch.clone, **keys):
    precision = PrecisionConfig(preset="te_delayed", **keys)
    named = {(f"layer{i}", "input"): quantizer for i, quantizer in enumerate(quantizers)}
    return AmaxHistories(named, precision, CPU, share)


def step(held, quantizer, amaxes, skipped=KEEP):
    """Cast tensors of these amaxes in one step; the scales that they got."""
    with held.recording(1):
        scales = [quantizer(torch.tensor([[amax, -amax / 3]])).scale.item() for amax in amaxes]
    held.update(skipped)
    return scales


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=repr)
def test_a_scale_is_of_the_amaxes_of_earlier_steps(algorithm, margin, fmt):
    quantizer, length = delayed(fmt), 3
    held = histories(
        [quantizer],
        fp8_amax_history_len=length,
        fp8_amax_compute_algo=algorithm,
        fp8_margin=margin,
    )
    steps = [(1.0, 3.0), (900.0,), (0.5, 0.25), (0.1,), (0.1,), (0.0,), (0.0,), (0.0,), (7.0,)]
    history = []
    for amaxes in steps:
        known = max(history[-length:] if algorithm == "max" else history[-1:], default=0.0)
        scale = 2.0 ** (math.floor(math.log2(fmt.max / known)) - margin) if known else 1.0
        assert step(held, quantizer, amaxes) == [scale] * len(amaxes)
        history += [max(amaxes)] if any(amaxes) else []


def test_what_exceeds_the_scale_saturates():
    quantizer = delayed()
    held = histories([quantizer])
    step(held, quantizer, [1.0])
    quantized = quantizer(torch.tensor([[1000.0, -5.0, 0.5]]))
    assert quantized.scale == 256.0
    assert KERNELS.dequantize(quantized).tolist() == [[1.75, -1.75, 0.5]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_fault_is_seen_and_a_skipped_step_forgotten(bad):
    quantizer = delayed()
    held = histories([quantizer])
    step(held, quantizer, [2.0])
    before = [history.clone() for history in held.by_key.values()]
    with held.recording(1):
        assert KERNELS.dequantize(quantizer(torch.tensor([[1.0, bad]]))).isnan().all()
    held.update(SKIP)
    assert all(map(torch.equal, before, held.by_key.values()))
    assert step(held, quantizer, [1.0]) == [128.0]


def test_nothing_is_recorded_outside_of_steps():
    quantizer = delayed()
    held = histories([quantizer])
    step(held, quantizer, [2.0])
    quantizer(torch.tensor([[400.0]]))  # an evaluation
    assert step(held, quantizer, [1.0]) == [128.0] == step(held, quantizer, [1.0])


def test_amaxes_of_all_ranks_count_and_every_tensor_has_its_own():
    first, second = delayed(), delayed(E5M2)
    shared = []

    def share(amaxes):
        shared.append(amaxes.tolist())
        return 4 * amaxes

    held = histories([first, second, Quantizer(E4M3, KERNELS)], share)
    with held.recording(1):
        first(torch.tensor([[1.0]])), second(torch.tensor([[8.0]]))
    held.update(KEEP)
    assert shared == [[1.0, 8.0]] and len(held.by_key) == 2
    assert first(torch.tensor([[1.0]])).scale == 64.0  # 448 / 4
    assert second(torch.tensor([[1.0]])).scale == 1024.0  # 57344 / 32


def test_histories_that_were_written_to_give_scales():
    one, two = delayed(), delayed()
    held, other = histories([one]), histories([two])
    step(held, one, [5.0])
    for mine, theirs in zip(other.by_key.values(), held.by_key.values(), strict=True):
        mine.copy_(theirs)
    other.refresh()
    assert two(torch.ones(1, 1)).scale == one(torch.ones(1, 1)).scale == 64.0
    other.clear()
    other.refresh()
    assert two(torch.ones(1, 1)).scale == 1.0


def test_gradients_count_as_those_of_one_micro_batch():
    """Backward's are divided by the number of micro-batches, which changes with the layout."""
    quantizers = delayed(), delayed()
    precision = PrecisionConfig(preset="te_delayed")
    held = [
        AmaxHistories({("layer", "grad_output"): quantizer}, precision, CPU, torch.clone)
        for quantizer in quantizers
    ]
    for number, (histories_of_one, quantizer) in enumerate(zip(held, quantizers, strict=True)):
        count = 4**number
        for _ in range(2):
            with histories_of_one.recording(count):
                quantized = quantizer(torch.tensor([[3.0 / count]]))
            histories_of_one.update(KEEP)
        assert KERNELS.dequantize(quantized) == 3.0 / count and quantized.scale == 128.0 * count
    assert all(map(torch.equal, *(one.by_key.values() for one in held)))
