"""Scaled tensors: what they share, what they refuse, and what quantizing does to bad values."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional

from fp8lm.kernels import ReferenceKernels
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32
from fp8lm.scaled_tensor import ScaledTensor

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
SCALED = [E4M3, E5M2, FP16]
ALL = [*SCALED, BF16, FP32]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", ALL, ids=repr)
@pytest.mark.parametrize("amplitude", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_keeps_values_to_half_a_unit(fmt, amplitude, dtype):
    x = (random(40, 25) * amplitude).to(dtype)
    q = KERNELS.quantize(x, fmt)
    error = (KERNELS.dequantize(q).double() - x.double()).abs()
    relative = 2.0 ** -(fmt.mantissa_bits + 1)
    subnormal = fmt.smallest_subnormal / 2 / q.scale.double()
    assert (error <= torch.maximum(relative * x.double().abs(), subnormal)).all()


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_scale_is_that_of_the_tensors_own_amax(fmt):
    for amplitude in (1e-4, 1.0, 1e4):  # never one of an earlier call
        x = random(64) * amplitude
        q = KERNELS.quantize(x, fmt)
        largest = (x.abs().max() * q.scale).item()
        assert fmt.max / 2 < largest <= fmt.max


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreign_amax_sets_the_scale_and_saturates(fmt, dtype):
    x = torch.tensor([1.0, -64.0, 3e4, -1e30], dtype=dtype)
    q = KERNELS.quantize(x, fmt, amax=torch.tensor(2.0))
    assert q.scale == KERNELS.quantize(torch.tensor([2.0]), fmt).scale
    limit = fmt.max / q.scale.item()
    assert KERNELS.dequantize(q).tolist() == [1.0, -limit, limit, -limit]


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_shards_with_a_shared_amax_are_shards_of_the_whole(fmt):
    x = random(8, 16) * torch.tensor([1.0] * 4 + [100.0] * 4)[:, None]
    whole = KERNELS.quantize(x, fmt)
    amax = KERNELS.amax(x)
    for start, stop in ((0, 4), (4, 8)):
        shard = KERNELS.quantize(x[start:stop], fmt, amax=amax)
        assert torch.equal(shard.payload, whole.rows(start, stop).payload)
        assert shard.scale == whole.scale


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("event", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_value_makes_the_scale_and_all_values_nan(fmt, event, dtype):
    x = random(37).to(dtype)
    x[20] = event
    q = KERNELS.quantize(x, fmt)
    assert q.scale.isnan()
    for out in (torch.float32, torch.bfloat16):
        assert KERNELS.dequantize(q, out).isnan().all()


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_nan_amax_of_another_shard_makes_all_values_nan(fmt):
    q = KERNELS.quantize(random(8), fmt, amax=torch.tensor(math.nan))
    assert KERNELS.dequantize(q).isnan().all()


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros(fmt, zero):
    q = KERNELS.quantize(torch.full((5,), zero), fmt)
    assert q.scale == 1.0
    assert KERNELS.dequantize(q).tolist() == [0.0] * 5


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
@pytest.mark.parametrize("amax", [1e-45, 1e-40, 2.0**-126, 3e38])
def test_extreme_amaxes_stay_finite(fmt, amax):
    x = torch.tensor([amax, -amax, 0.0])
    q = KERNELS.quantize(x, fmt)
    decoded = KERNELS.dequantize(q)
    assert q.scale.isfinite()
    assert decoded.isfinite().all()
    if amax * 2.0**126 > fmt.smallest_normal:
        assert torch.allclose(decoded, x, rtol=2.0 ** -(fmt.mantissa_bits + 1), atol=0)


@pytest.mark.parametrize("fmt", ALL, ids=repr)
def test_quantize_only_reads(fmt):
    x = random(30)
    before = x.clone()
    KERNELS.quantize(x, fmt)
    assert torch.equal(x, before)


@pytest.mark.parametrize("fmt", ALL, ids=repr)
def test_views_share_payload_and_scale(fmt):
    q = KERNELS.quantize(random(4, 6), fmt)
    pieces = {(6, 4): q.t(), (2, 6): q.rows(1, 3), (24,): q.view(-1), (2, 12): q.view(2, 12)}
    for shape, piece in pieces.items():
        assert piece.shape == shape
        assert piece.format is fmt
        assert piece.scale is q.scale
        base = piece.payload.untyped_storage().data_ptr()
        assert base == q.payload.untyped_storage().data_ptr()
    decoded = KERNELS.dequantize(q)
    assert torch.equal(KERNELS.dequantize(pieces[6, 4]), decoded.t())
    assert torch.equal(KERNELS.dequantize(pieces[2, 6]), decoded[1:3])


@pytest.mark.parametrize("fmt", SCALED, ids=repr)
def test_clone_and_copy(fmt):
    q = KERNELS.quantize(random(4, 6), fmt)
    clone, target = q.clone(), ScaledTensor.zeros((4, 6), fmt, CPU)
    payload, scale = target.payload, target.scale
    assert target.copy_(q) is target
    assert target.payload is payload  # in place
    assert target.scale is scale
    expected = KERNELS.dequantize(q)
    q.payload.zero_()
    q.scale.fill_(3.0)
    for independent in (clone, target):
        assert torch.equal(KERNELS.dequantize(independent), expected)


@pytest.mark.parametrize("other", [((4, 5), E4M3), ((4, 6), E5M2), ((4, 6), FP16)])
def test_copy_refuses_another_format_or_shape(other):
    target = ScaledTensor.zeros((4, 6), E4M3, CPU)
    with pytest.raises(TypeError, match="cannot copy"):
        target.copy_(ScaledTensor.zeros(*other, CPU))


@pytest.mark.parametrize(
    ("fmt", "nbytes"), [(E4M3, 28), (E5M2, 28), (FP16, 52), (BF16, 48), (FP32, 96)]
)
def test_nbytes_counts_the_scale_where_there_is_one(fmt, nbytes):
    assert ScaledTensor.zeros((4, 6), fmt, CPU).nbytes == nbytes


@pytest.mark.parametrize("fmt", ALL, ids=repr)
def test_zeros_are_zero(fmt):
    q = ScaledTensor.zeros((2, 3), fmt, CPU)
    assert (q.scale.item(), q.device, q.payload.dtype) == (1.0, CPU, fmt.storage)
    assert KERNELS.dequantize(q).tolist() == [[0.0] * 3] * 2


def test_fp8_view_has_the_codes_as_numbers():
    q = KERNELS.quantize(random(10), E4M3)
    assert q.fp8.dtype == torch.float8_e4m3fn
    assert torch.equal(q.fp8.float() / q.scale, KERNELS.dequantize(q))


@pytest.mark.parametrize(
    ("payload", "scale", "fmt", "complaint"),
    [
        (torch.zeros(3), torch.ones(()), E4M3, "stored as torch.uint8"),
        (torch.zeros(3).to(torch.float8_e4m3fn), torch.ones(()), E4M3, "stored as torch.uint8"),
        (torch.zeros(3, dtype=torch.uint8), torch.ones(()), FP16, "stored as torch.float16"),
        (torch.zeros(3), torch.ones(1), FP32, "is fp32 of shape"),
        (torch.zeros(3), torch.ones((), dtype=torch.float64), FP32, "is fp32 of shape"),
        (torch.zeros(3).half(), torch.ones(()).half(), FP16, "is fp32 of shape"),
    ],
)
def test_wrong_dtypes_are_refused(payload, scale, fmt, complaint):
    with pytest.raises(TypeError, match=complaint):
        ScaledTensor(payload, scale, fmt)


UNLISTED = {
    "add": lambda q, x: torch.add(q, 1),
    "mul with a tensor": lambda q, x: torch.mul(x, q),
    "matmul": lambda q, x: torch.matmul(x, q),
    "linear": lambda q, x: functional.linear(x, q),
    "stack": lambda q, x: torch.stack([q, q]),
    "equal": lambda q, x: torch.equal(q, q),
    "isfinite": lambda q, x: torch.isfinite(q),
    "tensor.copy_": lambda q, x: x.copy_(q),
    "tensor + q": lambda q, x: x + q,
    "q + 1": lambda q, x: q + 1,
    "q * tensor": lambda q, x: q * x,
    "q @ tensor": lambda q, x: q @ x,
    "-q": lambda q, x: -q,
    "q[0]": lambda q, x: q[0],
    "abs": lambda q, x: abs(q),
    "float": lambda q, x: float(q),
    "len": lambda q, x: len(q),
}


@pytest.mark.parametrize("name", UNLISTED)
def test_unlisted_operations_raise(name):
    q = KERNELS.quantize(random(4, 4), E4M3)
    with pytest.raises(TypeError):
        UNLISTED[name](q, random(4, 4))


@pytest.mark.parametrize("name", ["float", "half", "to", "sum", "grad"])
def test_methods_of_tensors_are_not_there(name):
    with pytest.raises(AttributeError):
        getattr(KERNELS.quantize(random(4), E4M3), name)


def test_message_says_what_to_do():
    with pytest.raises(TypeError, match=r"add .*ScaledTensor.*dequantize"):
        torch.add(KERNELS.quantize(random(4), E4M3), 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_survives_copying_and_pickling(duplicate):
    q = KERNELS.quantize(random(6), E4M3)
    other = duplicate(q)
    assert torch.equal(other.payload, q.payload)
    assert (other.scale, other.format) == (q.scale, E4M3)
