"""Where a layer's tensors become low precision: found by name, observed, shared between ranks."""

from __future__ import annotations

import pytest
import torch

from fp8lm.layers.quantizer import TENSOR_KINDS, Quantizer, quantizers_of
from fp8lm.numerics import BF16, E4M3, E5M2, PER_ROW
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


def test_scales_of_blocks_are_not_shared():
    with pytest.raises(ValueError, match="blocks of 1 x all"):
        Quantizer(E4M3, KERNELS, granularity=PER_ROW, share_amax=torch.clone)
