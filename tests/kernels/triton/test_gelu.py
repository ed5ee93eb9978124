"""GELU: within a rounding of the exact values, and of the reference's error."""

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.backend import TritonKernels
from tests.kernels.triton.compare import all_bf16_codes, normal
from tests.kernels.triton.traffic import counting

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()


def exact(x, dy, form):
    """Values and gradients in fp64, where nothing cancels."""
    x = x.double().requires_grad_()
    if form == "tanh":
        y = x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        y = 0.5 * x * torch.erfc(-x / math.sqrt(2))
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


@pytest.mark.parametrize("shape", [(5, 2, 66), (3, 4099), (0, 64), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_values_and_gradients(shape, dtype, scale, form, device):
    x, dy = normal(*shape, dtype=dtype, scale=scale), normal(*shape, dtype=dtype)
    y, dx = exact(x, dy, form)
    # A rounding, and an exponential whose argument, below 160 where it counts, is one of fp32. The
    # sum of 1 and erf(x / sqrt(2)) is 0 within a rounding or two of 1 from x = -5.5 on.
    rounding, cancels = torch.finfo(dtype).eps, {"tanh": 1e-36, "none": 6.0 * 2.0**-23}[form]
    mine = KERNELS.gelu(x.to(device), form).cpu()
    torch.testing.assert_close(mine.double(), y, rtol=rounding + 2.0**-14, atol=cancels)
    mine = KERNELS.gelu_backward(x.to(device), dy.to(device), form).cpu()
    # The derivative has a zero, near which its terms cancel.
    torch.testing.assert_close(mine.double(), dx, rtol=rounding + 2.0**-14, atol=2.0**-19)


@pytest.mark.parametrize("form", ["tanh", "none"])
def test_every_number_of_bf16_is_within_two_roundings_of_the_reference(form, device):
    x = all_bf16_codes()
    y, expected = KERNELS.gelu(x.to(device), form).cpu(), REFERENCE.gelu(x, form)
    # The reference's sum of 1 and the hyperbolic tangent, or erf, cancels for negative numbers.
    cancels = x.float().abs().clamp(max=16.0) * 2.0**-23
    if form == "none":  # where PyTorch makes 0 of subnormal numbers
        cancels += torch.finfo(torch.float32).tiny
    far = (y.float() - expected.float()).abs() > cancels + expected.float().abs() * 2.0**-7
    assert not far[expected.isfinite()].any()
    # The reference's erf form doubles on the way: the largest numbers overflow.
    overflows = (form == "none") & x.isfinite() & (x.float() >= 2.0**127)
    assert torch.equal(y.isfinite(), expected.isfinite() | overflows)


@pytest.mark.parametrize("event", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_events_in_a_gradient(event, form, device):
    x, dy = normal(4, 64), normal(4, 64)
    for given in ((x, 2), (dy, 3)):
        given[0][given[1], 7] = event
    mine = KERNELS.gelu_backward(x.to(device), dy.to(device), form).cpu()
    assert torch.equal(mine.isfinite(), REFERENCE.gelu_backward(x, dy, form).isfinite())


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic():
    x, dy = normal(5, 4100), normal(5, 4100)
    with counting() as traffic:
        KERNELS.gelu(x, "tanh")
        KERNELS.gelu_backward(x, dy, "tanh")
    assert traffic.measured == traffic.declared
    parts = 4 * 6
    assert traffic.declared == [
        ("gelu_values", x.nbytes, x.nbytes + parts),
        ("gelu_gradients", 2 * x.nbytes, x.nbytes + parts),
    ]
