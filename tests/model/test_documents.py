"""Documents in a sample do not see each other: a packed batch is its documents one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fp8lm.batch import Batch, Documents
from fp8lm.data.boundaries import document_starts
from fp8lm.layers.param import named_params
from fp8lm.model.objectives import LanguageModeling
from tests.model.tiny import FP32_KEYS, KERNELS, SHAPES, VOCABULARY, build, loss_and_gradients

EOD = VOCABULARY - 1
# Tokens with an EOD at these places. Bounds at the first and the last token, documents of one
# token, several EODs in a row, a sample of one document.
ENDS = {
    "first and last token": [(0, 14, 15), (7,)],
    "many in a row": [(3, 4, 5, 6, 7), tuple(range(16))],
    "one document beside two": [(), (9,)],
    "end with the sample": [(15,), (4, 15)],
}


def packed(ends, length=16, seed=0):
    """A batch whose samples have their EODs at `ends`, with its documents apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(ends), length)
    tokens = torch.randint(0, EOD, shape, generator=generator)
    for sample, places in zip(tokens, ends, strict=True):
        sample[list(places)] = EOD
    starts = torch.stack([document_starts(sample, EOD) for sample in tokens])
    return Batch(
        tokens=tokens,
        labels=torch.randint(0, VOCABULARY, shape, generator=generator),
        loss_mask=(torch.rand(shape, generator=generator) < 0.8).float(),
        position_ids=torch.arange(length) - starts,
        documents=Documents.from_starts(starts),
    )


def one_by_one(gpt, data):
    """Loss and gradients of the documents of `data`, each a sample of its own without a mask."""
    weights = named_params(gpt)
    for weight in weights.values():
        weight.main_grad.zero()
    losses, length, fields = [], data.tokens.shape[1], (data.tokens, data.labels, data.loss_mask)
    for first, end in pairwise(data.documents.cu_seqlens.tolist()):
        own = Batch(*(x[first // length, first % length :][None, : end - first] for x in fields))
        loss = LanguageModeling().loss(gpt.forward_step(None, own), own)
        losses.append(loss * (end - first) / data.tokens.numel())
        losses[-1].backward()
    for weight in weights.values():
        weight.main_grad.zero_if_unused()
    loss = torch.stack(losses).sum().detach()
    return loss, {name: weight.main_grad.value.clone() for name, weight in weights.items()}


def relative_error(result, expected):
    result, expected = (KERNELS.dequantize(x).double() for x in (result, expected))
    return ((result - expected).norm() / expected.norm()).item()


# 2^-24 per operation, in another order of sums.
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", ["gpt", "llama", "learned"])
def test_fp32_model_to_rounding(shape, ends):
    gpt, data = build(SHAPES[shape], FP32_KEYS), packed(ENDS[ends])
    expected_loss, expected = one_by_one(gpt, data)
    loss, gradients = loss_and_gradients(gpt, data)
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 3e-6, name


# A tensor's amax, and with it the scale, is that of all documents or of one. Scales are powers of
# two, so that payloads round alike, but for subnormals, whose step is 2^-18 of a tensor's largest
# element. Every micro-batch's wgrad is rounded to BF16 before it is added, 2^-9 of an element, and
# in o3 the sum to E4M3, 2^-4: for five documents one after the other, or once.
@pytest.mark.parametrize(("preset", "bound"), [("bf16", 0.01), ("te", 0.01), ("o3", 0.12)])
def test_low_precision_within_its_formats(preset, bound):
    model = SHAPES["llama"] | {"seq_length": 64}
    gpt, data = build(model, dict(preset=preset)), packed([(15, 31), (47,)], 64)
    expected_loss, expected = one_by_one(gpt, data)
    loss, gradients = loss_and_gradients(gpt, data)
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < bound, name


@pytest.mark.parametrize("preset", ["bf16", "o3"])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_with_the_same_mask(granularity, preset):
    data = packed(ENDS["first and last token"])
    results = [
        loss_and_gradients(build(SHAPES["llama"], dict(preset=preset), recompute=recompute), data)
        for recompute in (None, granularity)
    ]
    (loss, gradients), (same, others) = results
    assert torch.equal(loss, same)
    assert all(torch.equal(gradients[name].payload, others[name].payload) for name in gradients)


def test_without_the_mask_they_do_see_each_other():
    gpt, data = build(), packed(ENDS["one document beside two"])
    apart, together = (gpt(data.tokens, documents=d) for d in (data.documents, None))
    torch.testing.assert_close(apart[:10], together[:10])
    torch.testing.assert_close(apart[:, 0], together[:, 0])
    assert (apart[10:, 1] - together[10:, 1]).abs().amax(dim=1).min() > 0.01


def test_where_positions_begin():
    """RoPE turns a query against a key by their distance alone; learned positions are read."""
    data = packed(ENDS["first and last token"])
    for shape, matters in (("gpt", False), ("learned", True)):
        gpt = build(SHAPES[shape])
        restarting, running = (
            gpt.forward_step(None, replace(data, position_ids=positions))
            for positions in (data.position_ids, None)
        )
        difference = (restarting - running).abs().max() / running.abs().max()
        assert difference > 1e-2 if matters else difference < 1e-5
