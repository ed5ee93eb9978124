"""Amaxes of weights that are cast for their GEMMs: one exchange, and never a stale one."""

from __future__ import annotations

import pytest
import torch

from fp8lm.config import PrecisionConfig
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.layers.param import ParamSpec, QuantizedParam, named_params
from fp8lm.layers.quantizer import Quantizer, quantizers_of
from fp8lm.layers.tp_context import TPContext
from fp8lm.layers.weight_operands import cached_weight_operands
from fp8lm.model.objectives import LanguageModeling
from fp8lm.numerics import BF16, E4M3, FP16, FP32
from fp8lm.optim import StatePrecision
from fp8lm.training.state import optimizer_tensors
from fp8lm.training.step import train_step
from tests.model.tiny import CPU, KERNELS, batch, build
from tests.optim.bench import optimizer


class CountingContext(TPContext):
    """Another rank whose amaxes are twice as large."""

    def __init__(self):
        self.exchanged = []

    def max(self, values):
        self.exchanged.append(len(values))
        return 2 * values


def weight(stored, wanted=E4M3, largest=3.0, share_amax=pytest.fail):
    spec, quantizer = ParamSpec((16, 16), None, stored, FP32), Quantizer(wanted, KERNELS)
    quantizer.share_amax = share_amax
    made = QuantizedParam(spec, KERNELS, CPU, quantizer)
    value = torch.rand(16, 16)
    value[0, 0] = largest
    made.model_param.copy_(KERNELS.quantize(value, stored))
    return made


def test_one_exchange_for_all():
    weights = [weight(BF16), weight(FP16, largest=5.0), weight(E4M3), weight(BF16, BF16)]
    tp = CountingContext()
    with cached_weight_operands(weights, tp):
        scales = [w.operand().scale.item() for w in weights[:2]]
        assert scales == [64.0, 32.0]  # 448/6, 448/10
        assert weights[2].operand().payload is weights[2].payload
        assert weights[3].operand().payload is weights[3].payload
    assert tp.exchanged == [2]


def test_nothing_is_known_afterwards():
    made = weight(BF16, share_amax=None)
    with pytest.raises(KeyError), cached_weight_operands([made], TPContext()):
        assert made.operand().scale == 128.0
        raise KeyError
    made.model_param.copy_(KERNELS.quantize(torch.full((16, 16), 100.0), BF16))
    assert made.operand().scale == 4.0


def test_nothing_to_exchange():
    tp = CountingContext()
    with cached_weight_operands([weight(E4M3)], tp):
        pass
    assert tp.exchanged == []


@pytest.mark.parametrize("preset", ["te", "o1", "o2"])
def test_a_step_uses_the_scales_of_its_own_weights(preset):
    gpt = build({}, dict(preset=preset))
    weights = named_params(gpt)
    adam = optimizer(weights, StatePrecision.from_config(PrecisionConfig(preset=preset)))
    cast = weights["decoder.layers.0.self_attention.linear_qkv.weight"]
    scales = []
    for _ in range(3):
        train_step(gpt, adam, LanguageModeling(), [batch()], 0.5)
        values = KERNELS.dequantize(cast.model_param, torch.float32)
        scales.append(KERNELS.quantize(values, E4M3).scale.item())
        assert cast.operand().scale == scales[-1]
        with cached_weight_operands([cast], TPContext()):
            assert cast.operand().scale == scales[-1]
    assert len(set(scales)) > 1  # or a stale scale would not show


@pytest.mark.parametrize("preset", ["bf16", "te", "o1", "o2", "o3"])
def test_kept_operands_change_no_byte_and_are_made_once(preset):
    states, casts = [], []
    for cached in (False, True):
        gpt = build({}, dict(preset=preset, cache_weight_operands=cached))
        weights = named_params(gpt)
        adam = optimizer(weights, StatePrecision.from_config(PrecisionConfig(preset=preset)))
        seen = []
        for (_, kind), quantizer in quantizers_of(gpt).items():
            if kind == "weight":
                quantizer.observer = lambda x, quantized, seen=seen: seen.append(x.shape)
        for _ in range(2):
            batches = [batch(seed=seed) for seed in range(3)]
            train_step(gpt, adam, LanguageModeling(), batches, 0.01)
        casts.append(len(seen))
        states.append({name: tensor.clone() for name, tensor in optimizer_tensors(adam).items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    cast = 8 if preset in ("te", "o1", "o2") else 0
    assert casts == [cast * 2] * 2  # once in each of two steps


@pytest.mark.parametrize(("stored", "copies"), [(E4M3, 1), (FP16, 2), (BF16, 2)])
def test_bytes_of_kept_operands_are_counted(stored, copies):
    quantizer, meta = Quantizer(E4M3, HopperKernels()), torch.device("meta")
    spec = ParamSpec((32, 48), None, stored, FP32)
    made = QuantizedParam(spec, HopperKernels(), meta, quantizer, cache_operands=True)
    with cached_weight_operands([made], TPContext()):
        kept = {
            id(x.payload): x.payload.nbytes for x in (made.operand(), made.transposed_operand())
        }
    kept.pop(id(made.payload), None)
    assert sum(kept.values()) == made.operand_bytes == copies * 32 * 48
    made = QuantizedParam(spec, HopperKernels(), meta, quantizer)
    with cached_weight_operands([made], TPContext()):
        kept = [made.operand().payload, made.operand().payload]
        made.transposed_operand()
    assert kept[0] is kept[1]
    assert made.operand_bytes == (kept[0] is not made.payload) * kept[0].nbytes
