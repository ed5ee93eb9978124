"""Which formats a layer gets from the config."""

from __future__ import annotations

import pytest
import torch

from fp8lm.config import PrecisionConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.kernels.cublaslt import missing_gemm
from fp8lm.layers.linear import Linear
from fp8lm.layers.param import ParamSpec
from fp8lm.layers.recipe import BF16_GEMM, FP8_GEMM, FP32_GEMM, Recipe
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32

RNG = torch.Generator().manual_seed(1)
FP32_KEYS = dict(gemm="fp32", params_dtype="fp32")


def recipe(**precision):
    kernels = ReferenceKernels()
    return Recipe.from_config(PrecisionConfig(**precision), kernels, torch.device("cpu"))


def formats(r):
    return r.gemm, r.weight, r.weight_grad, r.high_precision


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (dict(preset="bf16"), (BF16_GEMM, BF16, FP32, BF16)),
        (dict(preset="te"), (FP8_GEMM, BF16, FP32, BF16)),
        (dict(preset="o1"), (FP8_GEMM, FP16, E4M3, BF16)),
        (dict(preset="o2"), (FP8_GEMM, FP16, E4M3, BF16)),
        (dict(preset="o3"), (FP8_GEMM, E4M3, E4M3, BF16)),
        (dict(preset="o3", main_grads_dtype="bf16"), (FP8_GEMM, E4M3, BF16, BF16)),
        (dict(preset="bf16", **FP32_KEYS), (FP32_GEMM, FP32, FP32, FP32)),
    ],
)
def test_formats_of_the_presets(precision, expected):
    assert formats(recipe(**precision)) == expected


def test_operands_of_fp8_gemms():
    assert (FP8_GEMM.input, FP8_GEMM.weight, FP8_GEMM.grad_output) == (E4M3, E4M3, E5M2)


def test_first_and_last_layer_in_bf16():
    r = recipe(preset="o3", first_last_layers_bf16=True)
    bf16 = (BF16_GEMM, BF16, FP32, BF16)
    inner = formats(r)
    assert [formats(r.for_layer(i, 4)) for i in range(4)] == [bf16, inner, inner, bf16]
    assert formats(r.for_layer(0, 1)) == bf16


def test_all_layers_alike_by_default():
    r = recipe(preset="o3")
    assert all(r.for_layer(i, 4) is r for i in range(4))


def test_first_and_last_layer_of_an_fp32_model_stay_fp32():
    r = recipe(preset="bf16", **FP32_KEYS, first_last_layers_bf16=True)
    assert formats(r.for_layer(0, 4)) == (FP32_GEMM, FP32, FP32, FP32)


@pytest.mark.parametrize("preset", ["te", "te_delayed", "o3", "deepseek", "mxfp8", "unit"])
def test_for_inference_a_token_is_scaled_without_its_neighbours(preset):
    r = recipe(preset=preset).for_inference()
    linear = Linear(ParamSpec((32, 128), None, r.weight, FP32), r)
    w = torch.randn(32, 128, generator=RNG) * 0.02
    linear.weight.model_param.copy_(r.kernels.quantize(w, r.weight))
    x = torch.randn(48, 128, generator=RNG).bfloat16() * torch.logspace(-4, 4, 128).bfloat16()
    y = linear(x)
    x[1:] *= 1e3
    assert torch.equal(linear(x)[0], y[0]) and not torch.equal(linear(x)[1:], y[1:])


NAMES = ("tensor", "row", "block_1x128", "block_128x128", "mx_1x32")


@pytest.mark.parametrize("of_input", NAMES)
@pytest.mark.parametrize("of_weight", NAMES)
def test_for_inference_a_gpu_has_the_gemm_that_it_had(of_input, of_weight):
    r = recipe(preset="te", scaling={"input": of_input, "weight": of_weight})
    before, after = r.gemm.scaling, r.for_inference().gemm.scaling
    if missing_gemm(before.input, before.weight) is None:
        assert missing_gemm(after.input, after.weight) is None
