"""The absolute maximum, which must not lose a NaN or an infinity wherever it sits."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels import ReferenceKernels

KERNELS = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 33), (2, 3, 70)])
def test_absolute_maximum(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    amax = KERNELS.amax(x)
    assert (amax.dtype, amax.shape) == (torch.float32, ())
    assert amax == max(abs(value) for value in x.flatten().tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_maximum_may_have_either_sign(dtype, sign):
    x = torch.tensor([0.5, 3.0 * sign, -0.25], dtype=dtype)
    assert KERNELS.amax(x) == 3.0


# Every position of a size that is not a multiple of a vector's length: body and tail of the loops.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("event", [math.nan, -math.nan, math.inf, -math.inf])
def test_an_event_survives_at_every_position(dtype, event):
    for position in range(71):
        x = torch.linspace(-2, 2, 71).to(dtype)
        x[position] = event
        amax = KERNELS.amax(x)
        assert amax.isnan() if math.isnan(event) else amax == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_stronger_than_infinity(dtype):
    for x in ([math.nan, math.inf], [math.inf, math.nan], [-math.inf, 1.0, math.nan]):
        assert KERNELS.amax(torch.tensor(x, dtype=dtype)).isnan()


def test_nan_survives_in_a_tensor_large_enough_for_several_threads():
    x = torch.zeros(300_000)
    x[123_457] = math.nan
    assert KERNELS.amax(x.view(300, 1000)).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [[0.0, 0.0], [-0.0, -0.0], [0.0, -0.0]])
def test_zero_is_positive_zero(dtype, zeros):
    amax = KERNELS.amax(torch.tensor(zeros, dtype=dtype))
    assert amax.view(torch.int32) == 0


def test_denormals_count():
    assert KERNELS.amax(torch.tensor([0.0, -1e-44])) == torch.tensor(1e-44)


def test_transposed_view():
    x = torch.randn(4, 6)
    assert KERNELS.amax(x.t()) == KERNELS.amax(x)
