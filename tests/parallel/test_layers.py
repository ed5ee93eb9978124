"""Linear layers, embedding and cross-entropy on several ranks against one process."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fp8lm.layers.cross_entropy import cross_entropy
from fp8lm.layers.embedding import embed
from fp8lm.layers.param import ParamSpec, QuantizedParam
from fp8lm.layers.tp_context import NO_TP
from fp8lm.layers.weight_grad_store import WeightGradStore
from fp8lm.model.init import normal_init
from fp8lm.model.parallel_linear import column_linear, row_linear
from fp8lm.numerics import BF16, FP32
from tests.parallel.ranks import (
    CPU,
    FP32_KEYS,
    KERNELS,
    error,
    own_rows,
    random,
    recipe,
    tensor_parallel,
)

TOKENS, IN, OUT = 16, 64, 128
CASES = [(size, sp) for size in (2, 4) for sp in (False, True)]
# bf16 wires: roundings of partial sums and of the result, 2^-9 each. FP8 wires: E4M3's 2^-4 of a
# term, in the mean 0.026, here of up to 3 of 4 terms or of the input and weight as well.
PRECISIONS = [
    (FP32_KEYS, "bf16", 2e-6),
    (dict(preset="bf16"), "bf16", 0.006),
    (dict(preset="te"), "bf16", 0.006),
    (dict(preset="o3"), "bf16", 0.006),
    (dict(preset="o3"), "fp8", 0.04),
    (dict(preset="bf16"), "fp8", 0.06),
]


def layer(kind, tp, precision):
    """A layer of fixed weights, and how its input and output are split over features."""
    r = recipe(tp, **precision)
    init = normal_init(0.02)
    if kind == "row":
        linear = row_linear(OUT, IN, init, r, bias=True)
    else:
        num_sections = 2 if kind == "gated" else 1
        linear = column_linear(OUT, IN, init, r, bias=True, num_sections=num_sections)
    for seed, weight in ((1, linear.weight), (2, linear.bias)):
        spec = weight.spec
        full = random(*spec.shape, seed=seed) * 0.02
        part = spec.shard_spec.take(full)
        amax = KERNELS.amax(full)
        weight.model_param.copy_(KERNELS.quantize(part, spec.format, amax=amax))
    return linear


def forward_backward(linear, x, dy):
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(dy)
    grads = (KERNELS.dequantize(w.main_grad.value) for w in (linear.weight, linear.bias))
    return y.detach(), x.grad, *grads


def compare_linear(kind, sequence_parallel, precision, wire):
    """Relative errors of y, dx, dw, db, each against this rank's part of one process's."""
    tp = tensor_parallel(sequence_parallel=sequence_parallel, gather=wire, reduce=wire)
    whole, part = layer(kind, NO_TP, precision), layer(kind, tp, precision)
    dtype = whole.path.precision.output
    x, dy = random(TOKENS, IN, seed=3, dtype=dtype), random(TOKENS, OUT, seed=4, dtype=dtype)
    expected = forward_backward(whole, x, dy)

    def sharded_side(full):
        num_sections = 2 if kind == "gated" else 1
        return tp.shard(1, num_sections).take(full)

    def replicated_side(full):
        return own_rows(full, tp)

    at_input, at_output = (sharded_side, replicated_side)
    if kind != "row":
        at_input, at_output = replicated_side, sharded_side
    results = forward_backward(part, at_input(x), at_output(dy))
    tp.sum_in_place([part.bias.main_grad.value.payload] if part.bias.spec.sequence_parallel else [])
    wanted = (
        at_output(expected[0]),
        at_input(expected[1]),
        part.weight.spec.shard_spec.take(expected[2]),
        part.bias.spec.shard_spec.take(expected[3]),
    )
    assert [r.shape for r in results] == [w.shape for w in wanted]
    return [error(*pair) for pair in zip(results, wanted, strict=True)]


@pytest.mark.parametrize(("size", "sequence_parallel"), CASES)
@pytest.mark.parametrize("kind", ["column", "gated", "row"])
def test_linear(run_distributed, size, sequence_parallel, kind):
    for precision, wire, bound in PRECISIONS:
        arguments = kind, sequence_parallel, precision, wire
        for errors in run_distributed(compare_linear, size, *arguments):
            assert max(errors) < bound, (precision, wire, errors)


def deferred_bytes(kind):
    """Bytes gathered in a backward that defers its weight gradient, and when that is computed.

    And whether the gradient is that of a backward that does not.
    """
    tp = tensor_parallel(sequence_parallel=True, gather="fp8", reduce="fp8")
    gradients, sent = [], []
    at_input, at_output = (TOKENS // 2, IN), (TOKENS // 2, OUT)
    if kind == "row":
        at_input = (TOKENS, IN // 2)
    else:
        at_output = (TOKENS, OUT // 2)
    for microbatch in (None, 7):
        linear, wgrad_store = layer(kind, tp, dict(preset="o3")), WeightGradStore()
        linear.weight.use_wgrad_store(wgrad_store)
        x = random(*at_input, seed=3 + tp.rank, dtype=torch.bfloat16).requires_grad_()
        y = linear(x)
        dy = random(*at_output, seed=5 + tp.rank, dtype=torch.bfloat16)
        counter = tp.gather_wire.counter
        counter.take()
        with wgrad_store.deferring(microbatch):
            y.backward(dy)
        sent.append(counter.take()["tp_gather"])
        if microbatch is not None:
            wgrad_store.compute(microbatch)
            sent.append(counter.take()["tp_gather"])
        gradients.append(KERNELS.dequantize(linear.weight.main_grad.value))
    return sent, torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_deferred_gradient_gathers_its_input_when_it_is_computed(run_distributed, kind):
    """Until then a rank holds its own part of the sequence, not the whole of it."""
    for (at_once, before, later), same in run_distributed(deferred_bytes, 2, kind):
        assert same
        assert at_once == before + later
        # One byte per element of this rank's input; a row-parallel layer gathers none.
        assert later == (TOKENS // 2 * IN if kind == "column" else 0)


VOCABULARY, HIDDEN = 32, 16


def table(shard_spec, fmt=FP32):
    spec = ParamSpec((VOCABULARY, HIDDEN), normal_init(1.0), fmt, FP32, shard_spec=shard_spec)
    weight = QuantizedParam(spec, KERNELS, CPU)
    full = random(VOCABULARY, HIDDEN, seed=5)
    weight.model_param.copy_(KERNELS.quantize(shard_spec.take(full), fmt))
    return weight


def compare_embedding(sequence_parallel, wire, fmt):
    tp = tensor_parallel(sequence_parallel=sequence_parallel, gather=wire, reduce=wire)
    ids = torch.randint(0, VOCABULARY, (8, 3), generator=torch.Generator().manual_seed(6))
    dy = random(8, 3, HIDDEN, seed=7, dtype=fmt.dtype)
    whole, part = table(NO_TP.shard(0), fmt), table(tp.shard(0), fmt)
    expected = embed(ids, whole)
    expected.backward(dy)
    result = embed(ids, part, tp.replicated_side())
    result.backward(own_rows(dy, tp))
    gradient = part.spec.shard_spec.take(whole.main_grad.value.payload)
    return (
        torch.equal(result, own_rows(expected, tp)),
        error(result, own_rows(expected, tp)),
        error(part.main_grad.value.payload, gradient),
    )


@pytest.mark.parametrize(("size", "sequence_parallel"), CASES)
@pytest.mark.parametrize("fmt", [BF16, FP32], ids=repr)
def test_embedding(run_distributed, size, sequence_parallel, fmt):
    for exact, _, gradient in run_distributed(
        compare_embedding, size, sequence_parallel, "bf16", fmt
    ):
        assert exact  # one term, zeros elsewhere
        assert gradient < 1e-6
    for _, values, gradient in run_distributed(
        compare_embedding, size, sequence_parallel, "fp8", fmt
    ):
        assert values < 0.04
        assert gradient < 0.04


def compare_cross_entropy(num_ids, dtype, offset):
    tp = tensor_parallel()
    full = (random(12, VOCABULARY, seed=8) * 5 + offset).to(dtype)
    labels = torch.randint(0, num_ids, (12,), generator=torch.Generator().manual_seed(9))
    dy = random(12, seed=10)
    whole = full.clone().requires_grad_()
    expected = functional.cross_entropy(whole[:, :num_ids].float(), labels, reduction="none")
    expected.backward(dy)
    part = tp.shard(1).take(full).requires_grad_()
    result = cross_entropy(part, labels, num_ids, tp, KERNELS)
    result.backward(dy)
    gradient = tp.shard(1).take(whole.grad)
    difference = (part.grad.float() - gradient.float()).abs().max().item()
    return result.detach(), (result - expected).abs().max().item(), difference


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("num_ids", [VOCABULARY, VOCABULARY - 5, 8])
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0.0), (torch.bfloat16, 300.0)])
def test_cross_entropy(run_distributed, size, num_ids, dtype, offset):
    # 300 is beyond exp's range: only the difference to the largest logit may be exponentiated.
    results = run_distributed(compare_cross_entropy, size, num_ids, dtype, offset)
    unit = torch.finfo(dtype).eps
    for losses, difference, gradient in results:
        assert torch.equal(losses, results[0][0])
        assert difference < (300 if offset else 30) * 2.0**-22
        assert gradient < 3 * max(unit, 2.0**-20)


def test_padding_takes_no_part_on_one_rank_either():
    logits, labels = random(4, VOCABULARY, seed=11), torch.tensor([0, 1, 2, 3])
    full = cross_entropy(logits, labels, VOCABULARY, NO_TP, KERNELS)
    assert torch.equal(full, functional.cross_entropy(logits, labels, reduction="none"))
    padded = cross_entropy(logits, labels, 8, NO_TP, KERNELS)
    assert torch.equal(padded, cross_entropy(logits[:, :8], labels, 8, NO_TP, KERNELS))
