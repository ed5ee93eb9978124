"""Messages: tensors of any format come back as they were, as views, at aligned addresses."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.comm import MessageLayout
from fp8lm.numerics import BF16, E2M5, E4M3, E5M2, FP16, FP32, Granularity
from tests.comm.ranks import KERNELS, message_bytes, same_bits, values

FORMATS = [E4M3, E5M2, FP16, BF16, FP32]


def tensors():
    shapes = [(3, 5), (16,), (), (2, 2, 7), (1,)]
    cases = enumerate(zip(shapes, FORMATS, strict=True))
    blocks = KERNELS.quantize(values(9, 4, 48), E2M5, granularity=Granularity(1, 16))
    per_tensor = [KERNELS.quantize(values(i, *s) * 10.0**i, fmt) for i, (s, fmt) in cases]
    return [*per_tensor[:2], blocks, *per_tensor[2:]]


def test_what_was_packed_comes_back():
    packed = tensors()
    packed[1].scale.fill_(math.nan)
    layout = MessageLayout.of(packed)
    message = layout.pack(packed)
    assert (message.dtype, message.shape) == (torch.uint8, (layout.nbytes,))
    for before, after in zip(packed, layout.views(message), strict=True):
        assert (after.format, after.granularity) == (before.format, before.granularity)
        assert same_bits(after.payload, before.payload)
        assert same_bits(after.scale, before.scale)
        assert (after.payload.data_ptr() - message.data_ptr()) % 16 == 0


def test_views_write_the_message():
    packed = tensors()
    layout = MessageLayout.of(packed)
    message = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for view, tensor in zip(layout.views(message), packed, strict=True):
        view.copy_(tensor)
    assert torch.equal(message, layout.pack(packed))


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("numel", [1, 16, 17, 800])
def test_size(fmt, numel):
    assert MessageLayout((((numel,), fmt),)).nbytes == message_bytes(numel, fmt)


def test_strided_payloads_are_sent_in_order():
    matrix = KERNELS.quantize(values(0, 4, 6), E4M3).t()
    layout = MessageLayout.of([matrix])
    assert same_bits(layout.views(layout.pack([matrix]))[0].payload, matrix.payload)


def test_another_layout_is_refused():
    layout = MessageLayout((((4,), E4M3),))
    with pytest.raises(ValueError, match=r"\(5,\), fp8_e4m3.*do not have the layout"):
        layout.pack([KERNELS.quantize(values(0, 5), E4M3)])
