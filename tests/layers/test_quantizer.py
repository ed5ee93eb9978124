"""Where a layer's tensors become low precision: found by name, observed, shared between ranks."""

from __future__ import annotations

import pytest
import torch

from fp8lm.layers.quantizer import TENSOR_KINDS, Quantizer, quantizers_of
from fp8lm.numerics import BF16, E4M3, E5M2, PER_ROW, Granularity
from tests.model.tiny import BATCH, KERNELS, SEQUENCE, VOCABULARY, build

LAYERS = [
    f"decoder.layers.{index}.{part}"
    for index in range(2)
    for part in (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
]


@pytest.mark.parametrize("preset", ["bf16", "te", "o2", "o3"])
def test_every_cast_of_a_step_is_observed(preset):
    gpt = build({}, dict(preset=preset))
    seen = {}

    def observer(key):
        def observe(x, quantized):
            seen.setdefault(key, []).append((x.shape, quantized.format))
            assert torch.equal(KERNELS.quantize(x, quantized.format).payload, quantized.payload)

        return observe

    for key, quantizer in quantizers_of(gpt).items():
        quantizer.observer = observer(key)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    gpt(tokens).float().square().mean().backward()
    # A weight stored as its GEMM reads it is not cast.
    stored = preset in ("bf16", "o3")
    kinds = [kind for kind in TENSOR_KINDS if not (stored and kind == "weight")]
    assert set(seen) == {(layer, kind) for layer in LAYERS for kind in kinds}
    fp8 = preset != "bf16"
    for (_, kind), casts in seen.items():
        assert len(casts) == (2 if kind == "weight" else 1)  # forward and dgrad
        wanted = (E5M2 if kind == "grad_output" else E4M3) if fp8 else BF16
        assert {fmt for _, fmt in casts} == {wanted}


def test_an_amax_is_shared_before_the_cast_and_only_where_there_is_a_scale():
    x = torch.tensor([[1.0, 3.0]])
    assert Quantizer(E4M3, KERNELS, share_amax=lambda amax: 4 * amax)(x).scale == 32.0
    assert Quantizer(E4M3, KERNELS, share_amax=pytest.fail)(x, amax=torch.tensor(12.0)).scale == 32
    assert Quantizer(BF16, KERNELS, share_amax=pytest.fail)(x).scale == 1.0


@pytest.mark.parametrize("granularity", [PER_ROW, Granularity(1, 16), Granularity(16, 16)], ids=str)
def test_both_orientations_are_cast_from_the_tensor(granularity):
    x = torch.randn(32, 48) * torch.logspace(-3, 3, 48)
    quantizer = Quantizer(E4M3, KERNELS, granularity=granularity)
    quantized, transposed = quantizer.with_transpose(x)
    for actual, expected in ((quantized, x), (transposed, x.t()), (quantizer.transposed(x), x.t())):
        wanted = KERNELS.quantize(expected.contiguous(), E4M3, granularity=granularity)
        assert torch.equal(KERNELS.dequantize(actual), KERNELS.dequantize(wanted))
        assert torch.equal(actual.scale, wanted.scale) and actual.granularity == granularity


@pytest.mark.parametrize(("dim", "rows", "columns"), [(0, 1.0, 0.5), (1, 0.5, 1.0)])
def test_scales_of_rows_are_shared_where_ranks_hold_parts_of_a_row(dim, rows, columns):
    def share_amax(amax):
        return 2 * amax

    x = torch.full((16, 32), 448.0)
    quantizer = Quantizer(
        E4M3, KERNELS, granularity=PER_ROW, share_amax=share_amax, sharded_dim=dim
    )
    assert (quantizer(x).scale == rows).all() and (quantizer.transposed(x).scale == columns).all()
    shared = share_amax(quantizer.local_amax(x))
    assert (quantizer(x, amax=shared).scale == rows).all()
    assert (quantizer.transposed(x, amax=shared).scale == columns).all()


def test_scales_of_whole_blocks_are_not_shared():
    quantizer = Quantizer(E4M3, KERNELS, granularity=Granularity(1, 16), share_amax=pytest.fail)
    quantizer.with_transpose(torch.randn(32, 24))
    assert quantizer.local_amax(torch.randn(32, 24)) is None
    with pytest.raises(ValueError, match="cuts blocks of 16 x 1"):
        quantizer.transposed(torch.randn(24, 32))
