"""Recomputation is bit-identical and stays in FP8; dropout; first and last layers in BF16."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fp8lm.layers.param import named_params
from fp8lm.numerics import BF16, E4M3, E5M2
from tests.layers.recording import RecordingKernels
from tests.model.tiny import SHAPES, batch, build, loss_and_gradients

DROPOUT = dict(hidden_dropout=0.2, attention_dropout=0.3)
FORWARD, BACKWARD = (E4M3, E4M3, True), (E5M2, E4M3, False)


def run(model, precision, recompute, kernels=None):
    gpt = build(model, precision, recompute=recompute, kernels=kernels or RecordingKernels())
    torch.manual_seed(5)
    return loss_and_gradients(gpt, batch())


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("shape", ["gpt", "llama"])
@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("preset", ["bf16", "o1", "o3"])
def test_recomputation_is_bit_identical(recompute, shape, dropout, preset):
    keys = {**SHAPES[shape], **dropout}
    loss, gradients = run(keys, dict(preset=preset), None)
    other_loss, other_gradients = run(keys, dict(preset=preset), recompute)
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient.payload, other_gradients[name].payload), name
        assert gradient.scale == other_gradients[name].scale


# Two layers of four matrices: forward 8, backward 16. Recomputing a layer repeats its forward.
@pytest.mark.parametrize(
    ("recompute", "forward", "attention"), [(None, 8, 2), ("selective", 8, 4), ("full", 16, 4)]
)
def test_what_is_recomputed_is_in_fp8(recompute, forward, attention):
    kernels = RecordingKernels()
    run({}, dict(preset="o3"), recompute, kernels)
    gemms = Counter(kernels.gemms)
    assert gemms[FORWARD] == forward
    assert gemms[BACKWARD] == 16
    assert kernels.attentions == attention
    assert sum(gemms.values()) == forward + 16 + 3  # 3: the head in BF16


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_nothing_is_recomputed_without_gradients(recompute):
    kernels = RecordingKernels()
    gpt = build({}, dict(preset="o3"), recompute=recompute, kernels=kernels)
    with torch.no_grad():
        gpt(batch().tokens)
    assert len(kernels.gemms) == 9


@pytest.mark.parametrize("where", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(where):
    gpt, data = build({where: 0.5}), batch()
    without = build({})(data.tokens)
    assert not torch.equal(gpt(data.tokens, sample_ids_B=data.sample_ids), without)
    assert torch.equal(gpt.eval()(data.tokens), without)


def test_attention_dropout_draws_from_the_generator():
    gpt, tokens = build(dict(attention_dropout=0.3)), batch().tokens
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(gpt(tokens))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_hidden_dropout_is_a_function_of_the_sample():
    gpt, tokens = build(dict(hidden_dropout=0.3)), batch().tokens
    same = tokens[:1].expand(2, -1)
    both = gpt(same, sample_ids_B=torch.tensor([7, 8]))
    alone = gpt(same[:1], sample_ids_B=torch.tensor([8]))
    torch.testing.assert_close(both[:, 1:], alone)
    assert not torch.allclose(both[:, 0], both[:, 1], atol=0.1)


def test_hidden_dropout_without_samples_is_refused():
    with pytest.raises(ValueError, match="numbers of the micro-batch's samples"):
        build(dict(hidden_dropout=0.3))(batch().tokens)


def test_first_and_last_layers_in_bf16():
    kernels = RecordingKernels()
    precision = dict(preset="o3", first_last_layers_bf16=True)
    gpt = build(dict(num_layers=4), precision, kernels=kernels)
    formats = {
        int(name.split(".")[2]): weight.spec.format
        for name, weight in named_params(gpt).items()
        if name.endswith("linear_fc1.weight")
    }
    assert formats == {0: BF16, 1: E4M3, 2: E4M3, 3: BF16}
    loss_and_gradients(gpt, batch())
    gemms = Counter((a, b) for a, b, _ in kernels.gemms)
    assert gemms == {(E4M3, E4M3): 8, (E5M2, E4M3): 16, (BF16, BF16): 3 * 8 + 3}


def test_saved_activations_of_linear_layers_are_bytes():
    saved = []
    gpt, tokens = build(SHAPES["llama"], dict(preset="o3")), batch().tokens
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gpt(tokens)
    codes = [tensor for tensor in saved if tensor.dtype == torch.uint8]
    per_layer = 32 + 32 + 32 + 48  # inputs of qkv, proj, fc1, fc2
    assert sum(tensor.nbytes for tensor in codes) == 2 * per_layer * tokens.numel()
