"""Messages made and read in one launch: the reference's bytes, whatever the number of parts."""

import math

import pytest
import torch

from fp8lm.comm import MessageLayout
from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP16, FP32, PER_ROW, granularity_of
from fp8lm.scaled_tensor import ScaledTensor
from tests.kernels.triton.compare import INPUTS, assert_same, assert_same_values, normal, wide
from tests.kernels.triton.traffic import counting

KERNELS, REFERENCE = TritonKernels(), ReferenceKernels()
FORMATS = [E4M3, E5M2, E2M5, FP16, BF16, FP32]


def messages(shape, fmt, count, device="cpu"):
    """Views of `count` messages of one tensor each, which follow each other in memory."""
    layout = MessageLayout(((tuple(shape), fmt),))
    buffer = torch.zeros(count, layout.nbytes, dtype=torch.uint8, device=device)
    return [tensor for (tensor,) in layout.views_of(list(buffer))]


def chunks(x, count, own):
    """What a rank sends of `x`: all of its equal parts but its own."""
    parts = list(x.chunk(count))
    return parts[:own] + parts[own + 1 :]


def assert_packed(x, fmt, count, own, device):
    here, there = chunks(x, count, own), chunks(x.to(device), count, own)
    expected = messages(here[0].shape, fmt, len(here))
    actual = messages(here[0].shape, fmt, len(here), device)
    REFERENCE.quantize_into(here, expected)
    KERNELS.quantize_into(there, actual)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    return actual, expected


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("name", INPUTS)
def test_parts_with_scales_of_their_own(fmt, name, device):
    x = INPUTS[name]()
    spread = torch.cat([x, x.flip(0) * 2.0**-9, x * 2.0**4, -x])
    assert_packed(spread, fmt, 4, 1, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "own"), [(2, 0), (2, 1), (3, 1), (5, 0), (5, 2), (5, 4)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 11), (2, 4100)])
def test_every_place_of_the_part_that_is_not_sent(dtype, count, own, shape, device):
    x = wide(count * shape[0], *shape[1:], dtype=dtype)
    assert_packed(x, E4M3, count, own, device)


@pytest.mark.parametrize("fmt", [E4M3, FP16], ids=repr)
def test_parts_without_elements(fmt, device):
    targets = messages((0, 8), fmt, 3, device)
    KERNELS.quantize_into([torch.zeros(0, 8, device=device)] * 3, targets)
    assert all(target.scale == 1.0 for target in targets)
    assert KERNELS.join(targets, torch.bfloat16).shape == (0, 8)


@pytest.mark.parametrize("event", [math.nan, math.inf, -math.inf])
def test_an_event_stays_in_its_message(event, device):
    x = normal(8, 40)
    x[5, 7] = event
    actual, _ = assert_packed(x, E4M3, 4, 0, device)
    finite = [bool(KERNELS.dequantize(message).isfinite().all()) for message in actual]
    assert finite == [True, False, True]


def test_parts_anywhere_in_memory(device):
    """Not at equal distances, or transposed."""
    x = normal(6, 50)
    for here in ([x[0], x[3], x[5], x[1]], [x[:3].t(), x[3:].t()]):
        there = [part.to(device) for part in here]
        actual = messages(here[0].shape, E5M2, len(here), device)
        expected = messages(here[0].shape, E5M2, len(here))
        KERNELS.quantize_into(there, actual)
        REFERENCE.quantize_into(here, expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("name", ["normal", "wide fp32", "zeros", "nan", "inf", "one"])
def test_a_scale_per_token(name, device):
    """A message of a pipeline: all payloads, then the scales."""
    x = INPUTS[name]()
    made = []
    for kernels, where in ((KERNELS, device), (REFERENCE, "cpu")):
        buffer = torch.zeros(x.numel() + 4 * len(x) + 16, dtype=torch.uint8, device=where)
        payload = buffer[: x.numel()].view(x.shape)
        scales = buffer[16 * math.ceil(x.numel() / 16) :][: 4 * len(x)].view(torch.float32)
        made.append(ScaledTensor(payload, scales[:, None], E4M3, PER_ROW))
        kernels.quantize_into([x.to(where)], made[-1:])
    assert_same(*made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("count", [1, 4])
def test_joined_values(dtype, fmt, count, device):
    x = wide(count * 3, 70) if fmt != FP16 else normal(count * 3, 70)
    parts = list(x.chunk(count))
    here, there = messages((3, 70), fmt, count), messages((3, 70), fmt, count, device)
    REFERENCE.quantize_into(parts, here)
    for one, other in zip(there, here, strict=True):
        one.copy_(ScaledTensor(other.payload.to(device), other.scale.to(device), fmt))
    assert_same_values(KERNELS.join(there, dtype), REFERENCE.join(here, dtype))


def received(terms, fmt, device="cpu"):
    """Messages of `terms`, with scales per block in E2M5, and what this rank keeps of the last."""
    granularity = granularity_of(fmt, tuple(terms[0].shape))
    layout = MessageLayout(((tuple(terms[0].shape), fmt),), (granularity,))
    cast = [REFERENCE.quantize(term, fmt, granularity=granularity) for term in terms]
    buffer = torch.stack([layout.pack([each]) for each in cast]).to(device)
    tensors = [tensor for (tensor,) in layout.views_of(list(buffer))]
    return tensors, tensors[-1].clone()


def both(terms, fmt, device):
    """On the CPU and on the device."""
    return received(terms, fmt), received(terms, fmt, device)


@pytest.mark.parametrize("own", [None, 0, 2, 3])
@pytest.mark.parametrize("is_cast", [True, False])
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_messages(own, is_cast, fmt, dtype, device):
    """And of a term that was not sent, cast or not. Their order counts: they are of all sizes."""
    terms = [wide(9, 384) * 3.0**i if fmt != FP16 else normal(9, 384) for i in range(3)]
    (here, own_here), (there, own_there) = both(terms, fmt, device)
    if own is not None:
        plain = normal(9, 384, dtype=dtype)
        here.insert(own, own_here if is_cast else plain)
        there.insert(own, own_there if is_cast else plain.to(device))
    expected = REFERENCE.sum_in_order(here, dtype)
    assert_same_values(KERNELS.sum_in_order(there, dtype), expected)


@pytest.mark.parametrize("fmt", [E4M3, E2M5, BF16], ids=repr)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 4100)])
def test_means_of_every_size(fmt, shape, device):
    terms = [wide(*shape) * 3.0**i for i in range(3)]
    (here, _), (there, _) = both(terms, fmt, device)
    actual = KERNELS.sum_in_order(there, torch.float32, divisor=24)
    assert_same_values(actual, REFERENCE.sum_in_order(here, torch.float32, divisor=24))


@pytest.mark.parametrize("event", [math.nan, math.inf])
@pytest.mark.parametrize("fmt", [E4M3, E2M5, BF16], ids=repr)
def test_a_sum_keeps_an_event(event, fmt, device):
    x = normal(4, 256)
    x[2, 200] = event
    (here, _), (there, _) = both([normal(4, 256), x], fmt, device)
    actual = KERNELS.sum_in_order(there, torch.float32)
    assert_same_values(actual, REFERENCE.sum_in_order(here, torch.float32))
    assert not actual[2, 200].isfinite()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_declared_traffic():
    x, (blocks, own) = normal(4 * 33, 128), received([normal(33, 256)] * 2, E2M5)
    sent = chunks(x, 4, 1)
    with counting() as traffic:
        packed = messages((33, 128), E4M3, 3)
        KERNELS.quantize_into(sent, packed)
        KERNELS.quantize_into(sent, messages((33, 128), FP32, 3))
        KERNELS.join(packed, torch.bfloat16)
        KERNELS.sum_in_order([packed[0], x[:33], *packed[1:]], torch.bfloat16)
        KERNELS.sum_in_order([own, *blocks], torch.float32, divisor=3)
    assert traffic.measured == traffic.declared
    numel, parts = 33 * 128, 2
    assert traffic.declared == [
        ("amaxes_of_chunks", 3 * 2 * numel, 3 * 4 * parts),
        ("cast_chunks", 3 * (2 * numel + 4 * parts), 3 * (numel + 4)),
        ("cast_chunks", 3 * 2 * numel, 3 * 4 * numel),
        ("decode_chunks", 3 * (numel + 4), 3 * 2 * numel),
        ("sum_terms", 3 * (numel + 4) + 2 * numel, 2 * numel),
        ("sum_rows", 3 * (2 * numel + 4 * 66), 4 * 2 * numel),
    ]
