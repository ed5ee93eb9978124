"""Messages between stages: a scale per token, exact bytes, faults that arrive as faults."""

from __future__ import annotations

import pytest
import torch

from fp8lm.comm import Wire, WireCounter
from fp8lm.comm.stages import StageWire, cast_rows
from fp8lm.numerics import E4M3
from fp8lm.scaled_tensor import quantize
from tests.parallel.ranks import KERNELS, random

SHAPE = (6, 2, 32)


def wire(precision, dtype=torch.bfloat16, shape=SHAPE):
    return StageWire(shape, dtype, Wire("pipeline", precision, WireCounter()), KERNELS)


def outliers():
    """Tokens of very different sizes."""
    sizes = torch.logspace(-6, 4, 12).view(6, 2, 1)
    return (random(*SHAPE, seed=1) * sizes).bfloat16()


def test_every_token_is_cast_on_its_own():
    x = outliers()
    arrived = wire("fp8").unpack(wire("fp8").pack(x))
    for i in range(6):
        for j in range(2):
            alone = quantize(x[i, j].float(), E4M3, KERNELS).dequantize(KERNELS)
            assert torch.equal(arrived[i, j].float(), alone)


def test_small_tokens_survive_beside_large_ones():
    x = outliers()
    arrived = wire("fp8").unpack(wire("fp8").pack(x)).float()
    error = (arrived - x.float()).norm(dim=-1) / x.float().norm(dim=-1)
    assert error.max() < 2**-4  # E4M3's relative step, whatever the token's size
    one_scale = quantize(x.float(), E4M3, KERNELS).dequantize(KERNELS)
    assert not one_scale[0].any()


@pytest.mark.parametrize(
    ("precision", "dtype", "nbytes"),
    [
        ("fp8", torch.bfloat16, 12 * (32 + 4)),
        ("bf16", torch.bfloat16, 12 * 64),
        ("bf16", torch.float32, 12 * 128),
    ],
)
def test_size_of_a_message(precision, dtype, nbytes):
    made = wire(precision, dtype)
    message = made.pack(outliers().to(dtype))
    assert (message.dtype, message.numel(), made.nbytes) == (torch.uint8, nbytes, nbytes)
    arrived = made.unpack(message)
    assert (arrived.dtype, tuple(arrived.shape)) == (dtype, SHAPE)
    if precision == "bf16":
        assert torch.equal(arrived, outliers().to(dtype))


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_stays_in_its_token(fault):
    x = outliers()
    x[3, 1, 7] = fault
    arrived = wire("fp8").unpack(wire("fp8").pack(x))
    assert arrived[3, 1].isnan().all()
    x[3, 1] = 0.0
    assert not arrived[(x != 0).any(-1)].isnan().any()


def test_zero_tokens():
    payload, scales = cast_rows(torch.zeros(4, 32), E4M3, KERNELS)
    assert not payload.any()
    assert scales.tolist() == [1.0] * 4
