"""A first moment in E4M3 decays to zero where no gradient comes, as one in fp32 does."""

from __future__ import annotations

import pytest
import torch

from fp8lm.numerics import E4M3, FP32
from tests.optim.bench import LR, optimizer, set_gradients, state_precision, weights


def total_movement(states, steps):
    """Mean |w - w0| of rows of a matrix that have a gradient in the first step only."""
    adam = optimizer(weights(E4M3, FP32, FP32), state_precision(*states))
    start = adam.kernels.dequantize(adam.states["linear"].master).clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        gradients = {
            name: torch.randn(weight.spec.shape, generator=generator)
            for name, weight in adam.weights.items()
        }
        if step:
            gradients["linear"][: len(start) // 2] = 0.0
        set_gradients(adam.weights, gradients)
        adam.step(LR)
    moved = (adam.kernels.dequantize(adam.states["linear"].master) - start).abs()
    return moved[: len(start) // 2].mean().item()


@pytest.mark.slow
def test_a_weight_without_gradients_comes_to_rest():
    """Rounded to nearest, subnormal moments never decay and push the weight for ever."""
    expected = total_movement(("fp32", "fp32", "fp32"), 300)
    for second in ("fp16", "fp8_e4m4_root"):
        moved = total_movement(("fp32", "fp8_e4m3", second), 300)
        assert moved == pytest.approx(expected, rel=0.25)
