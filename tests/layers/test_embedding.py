"""Lookup of table rows, and the fp32 sum of the gradients of every occurrence."""

from __future__ import annotations

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.embedding import embed
from fp8lm.layers.linear import GemmPath, linear
from fp8lm.layers.param import ParamSpec, QuantizedParam
from fp8lm.layers.recipe import BF16_GEMM, FP32_GEMM
from fp8lm.numerics import BF16, FP32

KERNELS = ReferenceKernels()
FORMATS = [BF16, FP32]
VOCABULARY, HIDDEN = 32, 16


def table(fmt):
    spec = ParamSpec((VOCABULARY, HIDDEN), lambda tensor, generator: tensor, fmt, FP32)
    weight = QuantizedParam(spec, KERNELS, torch.device("cpu"))
    values = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight.model_param.copy_(KERNELS.quantize(values, fmt))
    return weight


def batch(fmt, *shape):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 10, shape, generator=generator)  # every row many times, some never
    return ids, torch.randn(*shape, HIDDEN, generator=generator).to(fmt.dtype)


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("shape", [(40,), (8, 5)])
def test_rows_and_their_gradients(fmt, shape):
    weight = table(fmt)
    ids, dy = batch(fmt, *shape)
    h = embed(ids, weight)
    h.backward(dy)
    assert torch.equal(h, weight.payload[ids])
    expected = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float64)
    for token, row in zip(ids.flatten().tolist(), dy.view(-1, HIDDEN).double(), strict=True):
        expected[token] += row
    gradient = weight.main_grad.value.payload
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=2e-6)
    assert (gradient[10:] == 0).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_gradient_of_lookup_and_tied_head_meet(fmt):
    precision = {BF16: BF16_GEMM, FP32: FP32_GEMM}[fmt]
    ids, dy = batch(fmt, 48)
    x = dy.flip(0)
    dlogits = torch.randn(48, VOCABULARY, generator=torch.Generator().manual_seed(2)).to(fmt.dtype)
    gradients = []
    for uses in (("lookup",), ("head",), ("lookup", "head"), ("head", "lookup")):
        weight = table(fmt)
        weight.main_grad.value.payload.fill_(torch.nan)  # what an earlier step left
        for use in uses:
            if use == "lookup":
                embed(ids, weight).backward(dy)
            else:
                linear(x, weight, GemmPath(precision, KERNELS)).backward(dlogits)
        gradients.append(weight.main_grad.value.payload.double())
    lookup, head, *both = gradients
    for gradient in both:
        torch.testing.assert_close(gradient, lookup + head, rtol=1e-6, atol=1e-5)


def test_table_is_not_copied_and_nothing_is_saved_but_the_ids():
    saved = []
    weight = table(BF16)
    ids, _ = batch(BF16, 40)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda none: none):
        embed(ids, weight)
    assert [tensor.data_ptr() for tensor in saved] == [ids.data_ptr()]
