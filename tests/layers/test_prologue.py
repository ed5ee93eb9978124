"""A norm or activation inside a linear layer against the same function before it, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.activation import Gelu, SwiGlu
from fp8lm.layers.norm import NORMS
from fp8lm.layers.recipe import BF16_GEMM, FP8_GEMM, FP32_GEMM
from fp8lm.numerics import BF16, E4M3, FP32
from tests.layers.test_linear import IN, OUT, T, gradient_of, layer, random

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
GEMMS = [(FP8_GEMM, E4M3), (FP8_GEMM, BF16), (BF16_GEMM, BF16), (FP32_GEMM, FP32)]


def norm(kind, precision):
    made = NORMS[kind](IN, 1e-5, FP32 if precision == FP32_GEMM else BF16, KERNELS, CPU)
    for seed, child in enumerate(made.children()):
        child.param.data.add_(0.1 * random(IN, seed=50 + seed).to(child.param.dtype))
    return made


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


PROLOGUES = {
    "LayerNorm": lambda precision: (norm("LayerNorm", precision),) * 2,
    "RMSNorm": lambda precision: (norm("RMSNorm", precision),) * 2,
    "GELU": lambda precision: (Gelu(KERNELS), lambda x: functional.gelu(x, approximate="tanh")),
    "SwiGLU": lambda precision: (SwiGlu(KERNELS), swiglu),
}


def inputs(kind, precision):
    x = random(T // 4, 4, IN * (2 if kind == "SwiGLU" else 1), seed=7).to(precision.output)
    dy = random(T // 4, 4, OUT, seed=8).to(precision.output)
    return x.requires_grad_(), dy


def results(linear, run, x, dy, parameters):
    """Everything that a backward brings forth."""
    weights = [linear.weight, *parameters]
    for weight in weights:
        weight.main_grad.zero()
    x.grad = None
    y = run(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(gradient_of(weight) for weight in weights)]


@pytest.mark.parametrize("kind", PROLOGUES)
@pytest.mark.parametrize(("precision", "storage"), GEMMS)
def test_bits_are_those_of_two_functions(kind, precision, storage):
    prologue, function = PROLOGUES[kind](precision)
    linear = layer(precision, storage, bias=True)
    parameters = list(prologue.children()) if kind.endswith("Norm") else []
    x, dy = inputs(kind, precision)
    apart = results(linear, lambda x: linear(function(x)), x, dy, parameters)
    inside = results(linear, lambda x: linear(x, prologue), x, dy, parameters)
    again = results(
        linear,
        lambda x: checkpoint(linear, x, prologue, use_reentrant=False),
        x,
        dy,
        parameters,
    )
    for expected, fused, recomputed in zip(apart, inside, again, strict=True):
        assert torch.equal(expected, fused)
        assert torch.equal(expected, recomputed)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_norm_learns_from_an_input_that_does_not(kind):
    prologue, _ = PROLOGUES[kind](FP8_GEMM)
    linear = layer(FP8_GEMM, E4M3)
    x, dy = inputs(kind, FP8_GEMM)
    parameters = list(prologue.children())
    expected = results(linear, lambda x: linear(x, prologue), x, dy, parameters)
    actual = results(linear, lambda x: linear(x.detach(), prologue), x, dy, parameters)
    assert actual[1] is None
    for gradient, other in zip(expected[2:], actual[2:], strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("trained", [0, 1])
def test_one_parameter_of_a_norm_learns_alone(trained):
    """From an input that does not: dgrad runs for any parameter that wants it."""
    prologue, _ = PROLOGUES["LayerNorm"](FP8_GEMM)
    linear = layer(FP8_GEMM, E4M3)
    x, dy = inputs("LayerNorm", FP8_GEMM)
    parameters = list(prologue.children())
    expected = results(linear, lambda x: linear(x, prologue), x, dy, parameters)
    parameters[1 - trained].param.requires_grad_(False)
    actual = results(linear, lambda x: linear(x.detach(), prologue), x, dy, parameters)
    assert torch.equal(actual[3 + trained], expected[3 + trained])


@pytest.mark.parametrize("kind", PROLOGUES)
def test_the_output_of_a_prologue_is_not_kept(kind):
    """Beside the FP8 operand: the input, and a norm's two statistics per token."""
    prologue, _ = PROLOGUES[kind](FP8_GEMM)
    linear = layer(FP8_GEMM, E4M3)
    x, _ = inputs(kind, FP8_GEMM)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda none: none):
        linear(x, prologue)
    kept = sum(tensor.nbytes for tensor in saved)
    statistics = 2 * 4 * T if kind == "LayerNorm" else 0
    assert kept <= T * IN + 4 + x.nbytes + statistics
