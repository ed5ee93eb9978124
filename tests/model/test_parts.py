"""Rotary embedding, attention and MLP by themselves, and initial weights."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.kernels.rope import rotate
from fp8lm.layers.param import named_params
from fp8lm.model.init import initial_value
from fp8lm.model.rope import rope_tables
from tests.model import plain
from tests.model.tiny import CPU, KERNELS, SHAPES, build, model_config


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.parametrize(("size", "percent"), [(8, 1.0), (16, 0.5), (16, 0.25), (6, 1.0)])
def test_rope_is_a_complex_rotation(base, size, percent):
    x_SBND = random(40, 2, 3, size)
    cos, sin = rope_tables(64, size, base, percent, CPU)
    result = rotate(x_SBND, cos[:40], sin[:40])
    x_BSD = x_SBND.double().permute(1, 2, 0, 3).reshape(6, 40, size)
    expected = plain.rotate(x_BSD, torch.arange(40), base, percent)
    expected = expected.view(2, 3, 40, size).permute(2, 0, 1, 3)
    # The angle, up to 40, is rounded to fp32: 40 * 2^-24.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)


def test_rope_scaling_stretches_long_wavelengths_alone():
    """Llama 3.1's rule, by wavelengths: below 2048 tokens as they were, above 8192 eight times."""
    plain_angle, scaled = (
        rope_tables(2, 128, 500000.0, 1.0, CPU, factor)[1][1, 0, 0, :64].double().asin()
        for factor in (None, 8.0)
    )
    wavelength, ratio = 2 * math.pi / plain_angle, plain_angle / scaled
    short, long = wavelength < 2048, wavelength > 8192
    assert short.any() and long.any() and (~short & ~long).any()
    torch.testing.assert_close(ratio[short], torch.ones_like(ratio[short]), rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio[long], torch.full_like(ratio[long], 8), rtol=1e-5, atol=0)
    between = ratio[~short & ~long]
    assert (between[1:] > between[:-1]).all() and between[0] > 1 and between[-1] < 8


def test_rope_sees_only_the_distance_of_positions():
    cos, sin = rope_tables(64, 8, 10000.0, 1.0, CPU)
    q, k = (random(8, seed=seed).expand(64, 1, 1, 8) for seed in (1, 2))
    scores = (rotate(q, cos, sin)[5:] * rotate(k, cos, sin)[:-5]).sum(dim=-1)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_keeps_dtype_position_zero_and_what_is_not_rotated(dtype):
    cos, sin = (t.to(dtype) for t in rope_tables(4, 8, 10000.0, 0.5, CPU))
    x = random(4, 1, 2, 8).to(dtype)
    turned = rotate(x, cos, sin)
    assert turned.dtype == dtype
    assert torch.equal(turned[0], x[0])
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[1:, ..., :4], x[1:, ..., :4])


def weights_of(module, prefix):
    return {
        f"{prefix}.{name}": KERNELS.dequantize(weight.model_param).double()
        for name, weight in named_params(module).items()
    }


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("position", ["rope", "none"])
def test_attention_repeats_keys_and_values_of_a_group(groups, position):
    keys = dict(num_query_groups=groups, position_embedding_type=position)
    gpt, config = build(keys), model_config(**keys)
    module = gpt.decoder.layers["0"].self_attention
    x_SBH = random(16, 2, 32)
    y_SBH, _ = module(x_SBH, gpt.rope and tuple(table[:16] for table in gpt.rope))
    x_BSH, weights = x_SBH.double().transpose(0, 1), weights_of(module, "a")
    expected = plain.attention(x_BSH, weights, "a", config, torch.arange(16))
    torch.testing.assert_close(y_SBH.transpose(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["gpt", "llama"])
def test_mlp(shape):
    module = build(SHAPES[shape]).decoder.layers["0"].mlp
    x = random(16, 2, 32)
    expected = plain.mlp(x.double(), weights_of(module, "m"), "m", model_config(**SHAPES[shape]))
    torch.testing.assert_close(module(x)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_gate_comes_first():
    module = build(SHAPES["llama"]).decoder.layers["0"].mlp
    x = random(16, 2, 32)
    rows = module.linear_fc1.weight.payload
    rows[:48].zero_()  # silu(0) = 0
    assert (module(x)[0] == 0).all()


@pytest.fixture(scope="module")
def specs():
    gpt = build(dict(hidden_size=128, num_layers=3, init_method_std=0.03))
    return {name: weight.spec for name, weight in named_params(gpt).items()}


def test_initial_values_are_a_function_of_seed_and_name(specs):
    first = {name: initial_value(name, spec, 7) for name, spec in specs.items()}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for name in reversed(first):
        assert torch.equal(initial_value(name, specs[name], 7), first[name])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not used


def test_seeds_and_names_give_different_values(specs):
    name, other = (f"decoder.layers.{i}.mlp.linear_fc1.weight" for i in (0, 1))
    values = [initial_value(n, specs[n], seed) for n, seed in ((name, 1), (name, 2), (other, 1))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        correlation = torch.corrcoef(torch.stack((values[i].flatten(), values[j].flatten())))[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(values[0].numel())


def test_distributions_of_initial_values(specs):
    for name, spec in specs.items():
        value = initial_value(name, spec, 0)
        assert value.dtype == torch.float32
        if name.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            residual = "linear_proj" in name or "linear_fc2" in name
            std = 0.03 / math.sqrt(2 * 3) if residual else 0.03
            count = value.numel()
            assert abs(value.std().item() / std - 1) < 4.5 / math.sqrt(2 * count), name
            assert abs(value.mean().item()) < 4.5 * std / math.sqrt(count), name
