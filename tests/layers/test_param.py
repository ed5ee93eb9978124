"""What optimizer and checkpoint see of a weight, and how gradients reach its accumulator."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import ParamSpec, QuantizedParam, VectorParam, named_params, vector_spec
from fp8lm.layers.quantizer import Quantizer
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")


def matrix(fmt, shape=(6, 10), operand_format=None):
    spec = ParamSpec(shape, lambda t, generator: t, fmt, FP32)
    weight = QuantizedParam(spec, KERNELS, CPU, Quantizer(operand_format or fmt, KERNELS))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.model_param.copy_(KERNELS.quantize(values, fmt))
    return weight


def vector(fmt=BF16, size=5):
    return VectorParam(vector_spec(size, 1.0, fmt), KERNELS, CPU)


@pytest.mark.parametrize("fmt", [E4M3, FP16, BF16, FP32], ids=repr)
def test_compute_is_a_view_of_the_weight(fmt):
    weight = matrix(fmt)
    weight.model_param.payload.zero_()
    weight.model_param.scale.fill_(8.0)
    assert (weight.payload == 0).all()
    assert weight.scale == 8.0


@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_compute_of_a_vector_is_a_view_of_the_parameter(fmt):
    weight = vector(fmt)
    weight.model_param.payload.fill_(3.0)
    assert weight.param.tolist() == [3.0] * 5
    assert weight.model_param.scale == 1.0


@pytest.mark.parametrize("fmt", [E4M3, BF16, FP32], ids=repr)
def test_operand_in_the_stored_format_is_the_weight_itself(fmt):
    weight = matrix(fmt)
    assert weight.operand().payload is weight.payload
    assert weight.operand().scale is weight.scale


@pytest.mark.parametrize("stored", [FP16, BF16, FP32], ids=repr)
@pytest.mark.parametrize("wanted", [E4M3, E5M2, BF16], ids=repr)
def test_operand_in_another_format_is_requantized(stored, wanted):
    weight = matrix(stored, operand_format=wanted)
    before = weight.model_param.clone()
    operand = weight.operand()
    expected = KERNELS.quantize(KERNELS.dequantize(weight.model_param), wanted)
    assert torch.equal(operand.payload, expected.payload)
    assert (operand.scale, operand.format) == (expected.scale, wanted)
    assert torch.equal(weight.payload, before.payload)  # only read
    assert weight.scale == before.scale


def test_operand_follows_a_changed_weight():
    weight = matrix(FP16, operand_format=E4M3)
    first = weight.operand()
    weight.model_param.copy_(KERNELS.quantize(torch.full((6, 10), 1000.0), FP16))
    second = weight.operand()
    assert second.scale != first.scale
    assert KERNELS.dequantize(second).unique().tolist() == [1024.0]  # E4M3 has 960 and 1024


def test_vector_gradient_moves_to_the_accumulator():
    weight = vector()
    (weight.param * torch.arange(5.0).bfloat16()).sum().backward()
    assert weight.param.grad is None
    assert weight.main_grad.value.payload.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_vector_gradients_of_micro_batches_are_summed_in_fp32():
    weight = vector()
    for _ in range(300):
        weight.param.sum().backward()
    assert weight.main_grad.value.payload.tolist() == [300.0] * 5  # bf16 would stop at 256


def test_vector_uses_within_one_backward_are_summed():
    weight = vector(FP32)
    (weight.param * 2.0 + weight.param * 3.0).sum().backward()
    assert weight.main_grad.value.payload.tolist() == [5.0] * 5


class Listener:
    def __init__(self):
        self.calls = []

    def hear(self, *what):
        self.calls.append(what)


@pytest.mark.parametrize("make", [matrix, vector])
def test_neither_a_weight_nor_who_listens_is_kept_alive_by_autograd(make):
    weight, listener = make(BF16), Listener()
    weight.when_gradient_complete(listener.hear, "complete")
    if make is vector:
        weight.param.sum().backward()
        assert listener.calls == [("complete",)]
    alive = weakref.ref(weight), weakref.ref(listener)
    del weight, listener
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


@pytest.mark.parametrize("convert", ["float", "half", "bfloat16", "double"])
@pytest.mark.parametrize("make", [matrix, vector])
@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_dtype_conversion_is_ignored(convert, make, fmt):
    weight = make(fmt)
    module = nn.ModuleList([weight])
    before = weight.model_param.clone()
    getattr(module, convert)()
    assert weight.model_param.payload.dtype == fmt.dtype
    assert torch.equal(weight.model_param.payload, before.payload)


def test_named_weights_counts_a_shared_weight_once():
    module = nn.Module()
    module.first, module.norm = matrix(E4M3), vector()
    module.inner = nn.Module()
    module.inner.second, module.inner.shared = matrix(BF16), module.first
    weights = named_params(module)
    assert list(weights) == ["first", "norm", "inner.second"]
    assert weights["first"] is module.first


def test_state_dict_holds_bytes_and_fp32_scales():
    state = matrix(E4M3).state_dict()
    assert (state["payload"].dtype, state["scale"].dtype) == (torch.uint8, torch.float32)


def test_repr_names_shape_and_formats():
    assert "(6, 10), fp8_e4m3, grad=fp32" in repr(matrix(E4M3))
