"""The model against the same network in plain PyTorch: logits and the gradient of every weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8lm.layers.param import named_params
from fp8lm.model.objectives import LanguageModeling
from tests.model import plain
from tests.model.tiny import (
    BATCH,
    FP32_KEYS,
    KERNELS,
    SEQUENCE,
    SHAPES,
    VOCABULARY,
    batch,
    build,
    loss_and_gradients,
    model_config,
)


def double_weights(gpt):
    """The dequantized weights of `gpt` in float64, for `plain`."""
    return {
        name: KERNELS.dequantize(weight.model_param).double().requires_grad_()
        for name, weight in named_params(gpt).items()
    }


def reference(gpt, config, data):
    """Logits, loss and gradients in float64."""
    weights = double_weights(gpt)
    logits = plain.logits(data.tokens, weights, config)
    mask = data.loss_mask.double()
    loss = plain.loss(logits, data.labels, mask) * mask.mean()
    loss.backward()
    return logits.detach(), loss.detach(), {name: w.grad for name, w in weights.items()}


def relative_error(result, expected):
    return ((result.double() - expected).norm() / expected.norm()).item()


def compare(shape, precision, tolerance):
    gpt, data = build(SHAPES[shape], precision), batch()
    expected_logits, expected_loss, expected = reference(gpt, model_config(**SHAPES[shape]), data)
    logits = gpt(data.tokens)
    loss, gradients = loss_and_gradients(gpt, data)
    assert logits.shape == (SEQUENCE, BATCH, VOCABULARY)
    assert relative_error(logits.transpose(0, 1), expected_logits) < tolerance / 3
    assert abs(loss - expected_loss) / expected_loss < tolerance / 10
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(KERNELS.dequantize(gradient), expected[name]) < tolerance, name


# 2^-24 per operation; tens of roundings add up along the longest path.
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_model_is_plain_pytorch_to_rounding(shape):
    compare(shape, FP32_KEYS, 3e-6)


# 2^-9 and 2^-4: operands' roundings of about 8 GEMMs in a row. A wrong scale, layout or missing
# term is an error of the order of 1.
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("preset", "tolerance"), [("bf16", 0.03), ("te", 0.3), ("o1", 0.3), ("o3", 0.3)]
)
def test_low_precision_model_is_plain_pytorch_within_its_formats(shape, preset, tolerance):
    compare(shape, dict(preset=preset), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_shorter_sequences_are_a_prefix(shape):
    gpt, tokens = build(SHAPES[shape]), batch().tokens
    whole, half = gpt(tokens), gpt(tokens[:, : SEQUENCE // 2])
    torch.testing.assert_close(half, whole[: SEQUENCE // 2], rtol=1e-5, atol=1e-5)


POSITIONED = ["gpt", "partial rope", "learned"]


@pytest.mark.parametrize("shape", POSITIONED)
def test_positions_in_order_are_the_default(shape):
    gpt, data = build(SHAPES[shape], dict(preset="o3")), batch()
    given = replace(data, position_ids=torch.arange(SEQUENCE).expand(BATCH, -1))
    (loss, gradients), (same, others) = (loss_and_gradients(gpt, d) for d in (data, given))
    assert torch.equal(same, loss)
    for name, gradient in gradients.items():
        # Otherwise the samples' gradients of a position are added in BF16, here in fp32.
        if "position" not in name:
            assert torch.equal(gradient.payload, others[name].payload), name


@pytest.mark.parametrize("shape", POSITIONED)
def test_positions_that_restart_or_leave_gaps(shape):
    keys = SHAPES[shape] | {"max_position_embeddings": 2 * SEQUENCE}
    gpt, config = build(keys), model_config(**keys)
    positions = torch.stack((torch.arange(SEQUENCE) % 10, 2 * torch.arange(SEQUENCE)))
    data = replace(batch(), position_ids=positions)
    weights = double_weights(gpt)
    samples = zip(data.tokens, positions, strict=True)
    expected = [plain.logits(tokens[None], weights, config, own) for tokens, own in samples]
    expected, mask = torch.cat(expected), data.loss_mask.double()
    assert relative_error(gpt.forward_step(None, data).transpose(0, 1), expected) < 1e-6
    (plain.loss(expected, data.labels, mask) * mask.mean()).backward()
    for name, gradient in loss_and_gradients(gpt, data)[1].items():
        assert relative_error(KERNELS.dequantize(gradient), weights[name].grad) < 3e-6, name


def test_tied_gradient_is_the_sum_of_both_uses():
    tied = build(dict(untie_embeddings_and_output_weights=False))
    untied = build(dict(untie_embeddings_and_output_weights=True))
    weights = named_params(untied)
    for name, weight in named_params(tied).items():
        weights[name].model_param.copy_(weight.model_param)
    table = weights["embedding.word_embeddings.weight"].model_param
    weights["output_layer.weight"].model_param.copy_(table)
    (_, one), (_, two) = (loss_and_gradients(gpt, batch()) for gpt in (tied, untied))
    total = sum(
        two[f"{name}.weight"].payload for name in ("embedding.word_embeddings", "output_layer")
    )
    table_gradient = one["embedding.word_embeddings.weight"].payload
    torch.testing.assert_close(table_gradient, total, rtol=1e-5, atol=1e-7)


LAYER_MATRICES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def names(kinds, layers=2):
    return {f"decoder.layers.{i}.{kind}" for i in range(layers) for kind in kinds}


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_have_megatrons_names(shape):
    keys = SHAPES[shape]
    matrices = {f"{name}.weight" for name in names(LAYER_MATRICES)}
    biases = {f"{name}.bias" for name in names(LAYER_MATRICES)}
    if "disable_bias_linear" in keys:
        biases = {f"{n}.bias" for n in names(LAYER_MATRICES[:1]) if "add_qkv_bias" in keys}
    norms = {*names({"input_layernorm", "pre_mlp_layernorm"}), "decoder.final_layernorm"}
    if "qk_layernorm" in keys:
        norms |= names({"self_attention.q_layernorm", "self_attention.k_layernorm"})
    parts = ["weight"] if keys.get("normalization") == "RMSNorm" else ["weight", "bias"]
    tables = {"embedding.word_embeddings.weight"}
    if keys.get("position_embedding_type") == "learned_absolute":
        tables.add("embedding.position_embeddings.weight")
    if keys.get("untie_embeddings_and_output_weights"):
        tables.add("output_layer.weight")
    expected = matrices | biases | {f"{n}.{part}" for n in norms for part in parts} | tables
    weights = named_params(build(keys))
    assert set(weights) == expected
    assert {name for name, weight in weights.items() if weight.spec.decay} == matrices | tables


def test_loss_is_the_sum_over_unmasked_tokens_over_the_number_of_all():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SEQUENCE, BATCH, VOCABULARY, generator=generator).requires_grad_()
    data = batch()
    loss = LanguageModeling().loss(logits, data)
    expected = plain.loss(
        logits.detach().double().transpose(0, 1), data.labels, data.loss_mask.double()
    )
    expected = expected * data.loss_mask.double().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    masked = data.loss_mask.t() == 0
    assert masked.any()
    assert (logits.grad[masked] == 0).all()


def test_loss_of_bf16_logits_is_taken_in_fp32():
    logits, objective = torch.randn(SEQUENCE, BATCH, VOCABULARY).bfloat16(), LanguageModeling()
    assert objective.loss(logits, batch()) == objective.loss(logits.float(), batch())


def test_a_batch_with_every_token_masked_has_loss_and_gradient_zero():
    gpt, data = build(), batch()
    data.loss_mask.zero_()
    loss, gradients = loss_and_gradients(gpt, data)
    assert loss == 0.0
    assert all((g.payload == 0).all() for g in gradients.values())


@pytest.mark.parametrize("preset", ["bf16", "o1", "o3"])
@pytest.mark.parametrize("convert", ["float", "half", "bfloat16"])
def test_conversion_of_the_model_changes_nothing(preset, convert):
    gpt, data = build(SHAPES["gpt"], dict(preset=preset)), batch()
    state = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    logits, (loss, gradients) = gpt(data.tokens), loss_and_gradients(gpt, data)
    getattr(gpt, convert)()
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(tensor.view(state[name].dtype), state[name]), name
    assert torch.equal(gpt(data.tokens), logits)
    new_loss, new_gradients = loss_and_gradients(gpt, data)
    assert new_loss == loss
    assert all(torch.equal(gradients[n].payload, new_gradients[n].payload) for n in gradients)


@pytest.mark.parametrize("event", [torch.nan, torch.inf])
def test_a_bad_activation_reaches_loss_and_gradients(event):
    gpt, data = build(SHAPES["gpt"], dict(preset="o3")), batch()
    used = data.tokens[0, 0]
    gpt.embedding.word_embeddings.weight.payload[used, 0] = event
    loss, gradients = loss_and_gradients(gpt, data)
    assert loss.isnan()
    for name, gradient in gradients.items():
        assert KERNELS.dequantize(gradient).isnan().any(), name
