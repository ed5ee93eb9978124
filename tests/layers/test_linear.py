"""The three GEMMs of a linear layer, driven backward by random gradients."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.linear import Linear
from fp8lm.layers.param import ParamSpec, vector_spec
from fp8lm.layers.recipe import BF16_GEMM, FP8_GEMM, FP32_GEMM, OperandScaling, Recipe
from fp8lm.numerics import BF16, E4M3, E5M2, FP16, FP32, PER_ROW, Granularity
from tests.layers.recording import RecordingKernels

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
T, IN, OUT = 32, 48, 64
CASES = [
    (FP8_GEMM, E4M3),
    (FP8_GEMM, FP16),
    (FP8_GEMM, BF16),
    (BF16_GEMM, BF16),
    (BF16_GEMM, FP16),
    (FP32_GEMM, FP32),
]


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(precision, storage, *, kernels=KERNELS, bias=False, grad=FP32, shape=(OUT, IN)):
    spec = ParamSpec(shape, lambda tensor, generator: tensor, storage, grad)
    dense = FP32 if precision.output == torch.float32 else BF16
    bias = vector_spec(shape[0], 0.0, dense) if bias else None
    recipe = Recipe(
        gemm=precision,
        weight=storage,
        weight_grad=grad,
        high_precision=dense,
        first_last_layers_bf16=False,
        kernels=kernels,
        device=CPU,
    )
    linear = Linear(spec, recipe, bias=bias)
    linear.weight.model_param.copy_(kernels.quantize(random(*shape, seed=1) * 0.02, storage))
    return linear


def batch(precision, *, seed=2, amplitude=1.0):
    """Input and upstream gradient, the latter of the size gradients have."""
    x = (random(T, IN, seed=seed) * amplitude).to(precision.output)
    dy = (random(T, OUT, seed=seed + 1) * 1e-4).to(precision.output)
    return x.requires_grad_(), dy


def gradient_of(weight):
    """What has been accumulated: zero, not an earlier sum, where nothing has."""
    weight.main_grad.zero_if_unused()
    return KERNELS.dequantize(weight.main_grad.value).clone()


def run(linear, x, dy):
    """Output, input gradient, weight gradient."""
    linear.weight.main_grad.zero()
    y = linear(x)
    y.backward(dy)
    dx, x.grad = x.grad, None
    return y.detach(), dx, gradient_of(linear.weight)


def products(x, w, dy):
    """The layer in float64, and the same with magnitudes, which roundings are relative to."""
    x, w, dy = x.double(), w.double(), dy.double()
    exact = (x @ w.t(), dy @ w, dy.t() @ x)
    x, w, dy = x.abs(), w.abs(), dy.abs()
    return exact, (x @ w.t(), dy @ w, dy.t() @ x)


def dequantized(x, fmt):
    return KERNELS.dequantize(KERNELS.quantize(x.detach(), fmt))


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_gemms_of_the_dequantized_operands(precision, storage):
    linear = layer(precision, storage)
    x, dy = batch(precision)
    w = KERNELS.dequantize(linear.weight.model_param)
    operands = zip(
        (x, w, dy), (precision.input, precision.weight, precision.grad_output), strict=True
    )
    exact, magnitude = products(*(dequantized(*pair) for pair in operands))
    # One rounding of the output, and fp32 additions over at most 64 terms.
    unit = torch.finfo(precision.output).eps / 2
    for result, expected, m in zip(run(linear, x, dy), exact, magnitude, strict=True):
        bound = unit * expected.abs() + 64 * 2.0**-24 * m
        assert ((result.double() - expected).abs() <= bound).all()


SCALINGS = {
    "rows": OperandScaling(PER_ROW, PER_ROW, PER_ROW),
    "blocks of rows": OperandScaling(Granularity(1, 16), Granularity(1, 16), Granularity(1, 16)),
    "as DeepSeek": OperandScaling(Granularity(1, 16), Granularity(16, 16), Granularity(1, 16)),
    "gradients alone": OperandScaling(grad_output=PER_ROW),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_gemm_has_scales_along_its_own_contraction(scaling):
    scaling = SCALINGS[scaling]
    precision = replace(FP8_GEMM, grad_output=E4M3, scaling=scaling)
    linear = layer(precision, BF16)
    x, dy = batch(precision)
    # Amplitudes that differ within rows and columns: other scales would show.
    x = (x.detach() * torch.logspace(-2, 2, IN)).bfloat16().requires_grad_()
    dy = (dy * torch.logspace(-2, 2, T)[:, None]).bfloat16()
    w = linear.weight.model_param.payload
    results = run(linear, x, dy)

    def cast(tensor, granularity):
        quantized = KERNELS.quantize(tensor.contiguous(), E4M3, granularity=granularity)
        return KERNELS.dequantize(quantized).double()

    of_x, of_w, of_dy = (getattr(scaling, kind) for kind in ("input", "weight", "grad_output"))
    products = [
        (cast(x.detach(), of_x), cast(w, of_w)),
        (cast(dy, of_dy), cast(w.t(), of_w)),
        (cast(dy.t(), of_dy), cast(x.detach().t(), of_x)),
    ]
    for result, (a, b) in zip(results, products, strict=True):
        product, magnitude = a @ b.t(), a.abs() @ b.abs().t()
        bound = 2.0**-8 * product.abs() + 64 * 2.0**-24 * magnitude
        assert ((result.double() - product).abs() <= bound).all()


def test_scales_of_rows_take_four_bytes_more_each_of_what_is_saved():
    saved = []
    precision = replace(FP8_GEMM, scaling=OperandScaling(input=PER_ROW))
    x, _ = batch(precision)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda none: none):
        layer(precision, BF16)(x)
    assert [tensor.nbytes for tensor in saved] == [T * IN, 4 * IN]  # wgrad sums over tokens


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_against_the_unquantized_layer(precision, storage):
    linear = layer(precision, storage)
    x, dy = batch(precision)
    exact, _ = products(x.detach(), random(OUT, IN, seed=1) * 0.02, dy)
    # A rounding error spread evenly over half a unit has an rms of 2^-(bits + 1) / sqrt(3) of
    # the value at most; the errors of two operands and of the output add in quadrature.
    bits = [precision.input.mantissa_bits, precision.weight.mantissa_bits]
    backward = [precision.grad_output.mantissa_bits, bits[0]]
    output = {torch.bfloat16: 7, torch.float32: 20}[precision.output]  # fp32: sums round too
    results = run(linear, x, dy)
    for result, expected, operands in zip(results, exact, (bits, backward, backward), strict=True):
        squares = sum(4.0 ** -(b + 1) / 3 for b in (*operands, output))
        error = (result.double() - expected).norm() / expected.norm()
        assert error < 1.05 * math.sqrt(squares)  # 1.05: the rms of a sample


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_scales_follow_the_data_of_every_call(precision, storage):
    linear = layer(precision, storage)
    x, dy = batch(precision)
    first = run(linear, x, dy)
    factor_x, factor_dy = 2.0**13, 2.0**-17
    big = (x.detach() * factor_x).requires_grad_()
    second = run(linear, big, dy * factor_dy)
    # Powers of two: with scales of their own, the results differ by nothing else.
    factors = (factor_x, factor_dy, factor_x * factor_dy)
    for a, b, factor in zip(first, second, factors, strict=True):
        assert torch.equal(a * factor, b)
    assert all(torch.equal(a, b) for a, b in zip(first, run(linear, x, dy), strict=True))


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_gradient_accumulates_over_micro_batches(precision, storage):
    linear = layer(precision, storage)
    total = 0.0
    for seed in (10, 20, 30):
        x, dy = batch(precision, seed=seed)
        total = total + run(linear, x, dy)[2]
    linear.weight.main_grad.zero()
    for seed in (10, 20, 30):
        x, dy = batch(precision, seed=seed)
        linear(x).backward(dy)
    assert torch.equal(linear.weight.main_grad.value.payload, total)


def test_fp8_gradient_buffer_gets_the_quantized_gradient():
    x, dy = batch(FP8_GEMM)
    expected = KERNELS.quantize(run(layer(FP8_GEMM, E4M3), x, dy)[2], E4M3)
    linear = layer(FP8_GEMM, E4M3, grad=E4M3)
    run(linear, x, dy)
    assert torch.equal(linear.weight.main_grad.value.payload, expected.payload)
    assert linear.weight.main_grad.value.scale == expected.scale


@pytest.mark.parametrize("storage", [E4M3, FP16, BF16], ids=repr)
def test_formats_and_accumulation_of_the_gemms(storage):
    kernels = RecordingKernels()
    x, dy = batch(FP8_GEMM)
    run(layer(FP8_GEMM, storage, kernels=kernels), x, dy)
    assert kernels.gemms == [(E4M3, E4M3, True), (E5M2, E4M3, False), (E5M2, E4M3, False)]


@pytest.mark.parametrize(
    ("precision", "storage", "nbytes"),
    [(FP8_GEMM, E4M3, T * IN), (BF16_GEMM, BF16, 2 * T * IN), (FP32_GEMM, FP32, 4 * T * IN)],
)
def test_saved_for_backward_is_the_input_in_its_gemm_format_and_one_scale(
    precision, storage, nbytes
):
    saved = []
    x, _ = batch(precision)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda none: none):
        layer(precision, storage, bias=True)(x)
    payload, scale = saved
    assert (payload.dtype, payload.nbytes) == (precision.input.storage, nbytes)
    assert (scale.dtype, scale.nbytes) == (torch.float32, 4)


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_backward_of_an_input_without_gradient(precision, storage):
    linear = layer(precision, storage)
    x, dy = batch(precision)
    _, _, expected = run(linear, x, dy)
    y, dx, dw = run(linear, x.detach(), dy)
    assert y.shape == (T, OUT)
    assert dx is None
    assert torch.equal(dw, expected)


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_recomputation_is_identical_and_in_the_same_formats(precision, storage):
    kernels = RecordingKernels()
    first = layer(precision, storage, kernels=kernels)
    second = layer(precision, storage, kernels=kernels, shape=(IN, OUT))

    def network(x):
        return second(first(x).relu())

    results, formats = [], []
    for recompute in (False, True):
        x, _ = batch(precision)
        dy = random(T, IN, seed=4).to(precision.output)
        for linear in (first, second):
            linear.weight.main_grad.zero()
        kernels.gemms.clear()
        y = checkpoint(network, x, use_reentrant=False) if recompute else network(x)
        y.backward(dy)
        grads = (gradient_of(linear.weight) for linear in (first, second))
        results.append((y.detach(), x.grad, *grads))
        formats.append([*kernels.gemms])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    plain, recomputed = map(Counter, formats)
    forward = Counter({(precision.input, precision.weight, True): 2})
    assert recomputed - plain == forward


@pytest.mark.parametrize("convert", ["float", "half", "bfloat16", "double"])
@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_conversion_of_a_module_changes_no_weight_and_no_output(precision, storage, convert):
    linear = layer(precision, storage, bias=True)
    linear.bias.model_param.payload.copy_(random(OUT, seed=6))
    x, dy = batch(precision)
    before = run(linear, x, dy)
    payload, scale = (tensor.clone() for tensor in (linear.weight.payload, linear.weight.scale))
    getattr(linear, convert)()
    assert torch.equal(linear.weight.payload, payload)
    assert torch.equal(linear.weight.scale, scale)
    assert linear.weight.scale.dtype == torch.float32
    for a, b in zip(before, run(linear, x, dy), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_bias(precision, storage):
    linear = layer(precision, storage, bias=True)
    x, dy = batch(precision)
    without = run(layer(precision, storage), x, dy)
    bias = random(OUT, seed=6).to(precision.output)
    linear.bias.model_param.payload.copy_(bias)
    y, dx, dw = run(linear, x, dy)
    assert torch.equal(y, without[0] + bias)
    assert torch.equal(dx, without[1])
    assert torch.equal(dw, without[2])
    # Summed over tokens in fp32, rounded once to the dtype of activations.
    db, exact = linear.bias.main_grad.value.payload, dy.double().sum(dim=0)
    bound = torch.finfo(precision.output).eps / 2 * exact.abs() + 32 * 2.0**-24 * dy.abs().sum(0)
    assert db.dtype == torch.float32
    assert ((db.double() - exact).abs() <= bound).all()
    assert linear.bias.param.grad is None


@pytest.mark.parametrize("shape", [(2, 16, IN), (4, 2, 4, IN)])
def test_leading_dimensions_are_tokens(shape):
    linear = layer(FP8_GEMM, E4M3)
    x, dy = batch(FP8_GEMM)
    expected = run(linear, x, dy)
    y, dx, dw = run(linear, x.detach().view(shape).requires_grad_(), dy.view(*shape[:-1], OUT))
    assert (y.shape, dx.shape) == ((*shape[:-1], OUT), shape)
    for a, b in zip((y.view(T, OUT), dx.view(T, IN), dw), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("precision", "storage"), CASES)
def test_operands_of_any_strides(precision, storage):
    linear = layer(precision, storage)
    x, dy = batch(precision)
    expected = run(linear, x, dy)
    strided = x.detach().t().contiguous().t().requires_grad_()
    results = run(linear, strided, dy.t().contiguous().t())
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    run(linear, x, dy[:1, :1].expand(T, OUT))  # what .sum().backward() sends


@pytest.mark.parametrize("event", [math.nan, math.inf])
def test_a_bad_input_reaches_everything(event):
    linear = layer(FP8_GEMM, E4M3, grad=E4M3)
    x, dy = batch(FP8_GEMM)
    with torch.no_grad():
        x[3, 5] = event
    y, dx, dw = run(linear, x, dy)
    assert y.isnan().all()
    assert dx.isfinite().all()
    assert dw.isnan().all()


@pytest.mark.parametrize("event", [math.nan, math.inf])
def test_a_bad_gradient_reaches_everything(event):
    linear = layer(FP8_GEMM, E4M3, grad=E4M3)
    x, dy = batch(FP8_GEMM)
    dy[3, 5] = event
    _, dx, dw = run(linear, x, dy)
    assert dx.isnan().all()
    assert dw.isnan().all()


def test_fp8_refuses_a_number_of_tokens_that_tensor_cores_refuse():
    with pytest.raises(ValueError, match="divisible by 16"):
        layer(FP8_GEMM, E4M3)(torch.ones(8, IN, dtype=torch.bfloat16))


def test_no_graph_without_gradients():
    x, _ = batch(FP8_GEMM)
    with torch.no_grad():
        assert not layer(FP8_GEMM, E4M3)(x).requires_grad
