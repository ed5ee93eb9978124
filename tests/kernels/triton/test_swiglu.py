"""SwiGLU: within a rounding of the reference."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.backend import TritonKernels
from tests.kernels.triton.compare import normal
from tests.kernels.triton.traffic import counting

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()


@pytest.mark.parametrize("shape", [(5, 2, 2), (3, 2, 66), (2, 1, 2080), (0, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_values_and_gradients(shape, dtype, scale, device):
    x, dy = normal(*shape, dtype=dtype, scale=scale), normal(*shape, dtype=dtype)[..., ::2]
    largest = float(x.abs().max()) if x.numel() else 0.0
    # Two roundings, and an exponential whose argument is rounded to fp32.
    bound = 2 * torch.finfo(dtype).eps + (2 + largest) * 2.0**-23
    y = KERNELS.swiglu(x.to(device)).cpu()
    torch.testing.assert_close(y, REFERENCE.swiglu(x), rtol=bound, atol=0)
    dx = KERNELS.swiglu_backward(x.to(device), dy.to(device)).cpu()
    # The derivative of silu has a zero, near which its terms cancel.
    cancels = 2.0**-22 * float((dy * x.chunk(2, dim=-1)[1]).abs().max()) if x.numel() else 0.0
    torch.testing.assert_close(dx, REFERENCE.swiglu_backward(x, dy), rtol=bound, atol=cancels)


@pytest.mark.parametrize("event", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [3, 35])
def test_events(event, column, device):
    x, dy = normal(4, 64), normal(4, 32)
    x[2, column] = event
    for mine, reference in (
        (KERNELS.swiglu(x.to(device)), REFERENCE.swiglu(x)),
        (KERNELS.swiglu_backward(x.to(device), dy.to(device)), REFERENCE.swiglu_backward(x, dy)),
    ):
        assert torch.equal(mine.cpu().isfinite(), reference.isfinite())


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic():
    x, dy = normal(5, 64), normal(5, 32)
    with counting() as traffic:
        KERNELS.swiglu(x)
        KERNELS.swiglu_backward(x, dy)
    assert traffic.measured == traffic.declared
    half, parts = 2 * 5 * 32, 4 * 5
    assert traffic.declared == [
        ("gated", 2 * half, half + parts),
        ("gated_gradients", 3 * half, 2 * half + parts),
    ]
