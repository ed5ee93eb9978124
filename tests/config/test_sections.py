"""Sections are frozen, strict about types and resolved when built."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fp8lm.config import PRESETS, ModelConfig, OptimizerConfig, PrecisionConfig, build_config
from fp8lm.runtime.errors import InputError


def model(**keys):
    return ModelConfig(
        **{"num_layers": 1, "hidden_size": 128, "num_attention_heads": 8, "seq_length": 32, **keys}
    )


@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [
        ({}, "ffn_hidden_size", 512),
        ({"swiglu": True}, "ffn_hidden_size", 320),  # 8/3 * 128 = 341.3
        ({"swiglu": True, "ffn_hidden_size": 352}, "ffn_hidden_size", 352),
        ({"ffn_hidden_size": None}, "ffn_hidden_size", 512),
        ({}, "num_query_groups", 8),
        ({"num_query_groups": 2}, "num_query_groups", 2),
        ({}, "kv_channels", 16),
        ({"kv_channels": 32}, "kv_channels", 32),
        ({}, "max_position_embeddings", 32),
        ({"num_query_groups": 2}, "query_projection_size", 128),
        ({"num_query_groups": 2}, "kv_projection_size", 32),
    ],
)
def test_derived_model_keys(keys, name, value):
    assert getattr(model(**keys), name) == value


def test_min_lr_is_a_tenth_of_lr_unless_given():
    assert OptimizerConfig(lr=1.0).min_lr == 0.1
    assert OptimizerConfig(lr=1.0, min_lr=0.0).min_lr == 0.0


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_every_key(preset):
    dumped = PrecisionConfig(preset=preset).model_dump()
    assert {key: dumped.pop(key) for key in PRESETS[preset]} == PRESETS[preset]
    of_delayed_scaling = {"fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_margin"}
    others = {"preset", "smooth_swiglu", "grad_reduce", "cache_weight_operands", "kernels", "guard"}
    assert dumped.keys() == others | of_delayed_scaling


# gemm, weight, master, gradient, m, v: NUMERICS of the paper's levels (FP8-LM, section 2.2)
@pytest.mark.parametrize(
    ("preset", "formats"),
    [
        ("bf16", "bf16 bf16 fp32 fp32 fp32 fp32"),
        ("te", "fp8 bf16 fp32 fp32 fp32 fp32"),
        ("o1", "fp8 fp16 none fp8_e4m3 fp32 fp32"),
        ("o2", "fp8 fp16 none fp8_e4m3 fp8_e4m3 fp16"),
        ("o3", "fp8 fp8_e4m3 fp16 fp8_e4m3 fp8_e4m3 fp16"),
    ],
)
def test_preset_levels(preset, formats):
    p = PrecisionConfig(preset=preset)
    kept = (p.params_dtype, p.main_params_dtype, p.main_grads_dtype)
    assert " ".join((p.gemm, *kept, p.exp_avg_dtype, p.exp_avg_sq_dtype)) == formats


# Table 6 of FP8-LM: (master, m, v) of every row must be expressible.
@pytest.mark.parametrize(
    "row",
    [
        ("fp32", "fp32", "fp32"),
        ("fp16", "fp8_e4m3", "fp16"),
        ("bf16", "fp8_e4m3", "fp16"),
        ("fp8_e4m3", "fp8_e4m3", "fp16"),
        ("fp16", "fp8_e4m3", "fp8_e4m3"),
    ],
)
def test_key_overrides_preset(row):
    names = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    precision = PrecisionConfig(preset="o3", **dict(zip(names, row, strict=True)))
    assert tuple(getattr(precision, name) for name in names) == row
    assert precision.params_dtype == "fp8_e4m3"


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        model().hidden_size = 256


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "train_iters", "abc", "integer >= 1 or null"),
        ("train", "train_iters", "10", "integer >= 1 or null"),
        ("train", "train_iters", True, "integer >= 1 or null"),
        ("train", "train_iters", 1.5, "integer >= 1 or null"),
        ("train", "micro_batch_size", 0, "integer >= 1"),
        ("train", "micro_batch_size", None, "integer >= 1"),
        ("train", "rampup_batch_size", [1, 2], "[integer >= 1, integer >= 1, integer >= 1]"),
        ("train", "rampup_batch_size", [1, "x", 2], "[integer >= 1, integer >= 1, integer >= 1]"),
        ("optimizer", "lr", "fast", "number > 0"),
        ("optimizer", "lr", True, "number > 0"),
        ("optimizer", "lr", float("nan"), "number > 0"),
        ("optimizer", "lr", float("inf"), "number > 0"),
        ("optimizer", "adam_beta1", 1.0, "number >= 0 and < 1"),
        ("model", "swiglu", 1, "true | false"),
        ("model", "swiglu", "true", "true | false"),
        ("model", "normalization", "BatchNorm", "LayerNorm | RMSNorm"),
        ("precision", "preset", "o9", "bf16 | te | o1 | o2 | o3"),
        ("logging", "dir", 3, "text or null"),
        ("logging", "dir", "", "text or null"),
        ("data", "data_path", {"a": 1}, "list of (number >= 0 or text) or text or null"),
        ("data", "data_path", [[1]], "list of (number >= 0 or text) or text or null"),
    ],
)
def test_wrong_type_names_key_value_and_expectation(content, section, key, value, expected):
    content.setdefault(section, {})[key] = value
    with pytest.raises(InputError) as caught:
        build_config(content)
    message = str(caught.value)
    assert f"{section}.{key} = " in message
    assert f"expected {expected}" in message
    assert ";" not in message  # one mistake, one complaint


def test_integer_stands_for_a_number(content):
    content["optimizer"]["weight_decay"] = 1
    weight_decay = build_config(content).optimizer.weight_decay
    assert (type(weight_decay), weight_decay) == (float, 1.0)


def test_missing_keys_are_all_named():
    with pytest.raises(InputError) as caught:
        build_config({"train": None})
    for key in ("model.num_layers", "train.micro_batch_size", "optimizer.lr"):
        assert f"{key} is missing" in str(caught.value)


def test_section_that_is_no_mapping(content):
    with pytest.raises(InputError, match=r"model = 3: expected a section of keys"):
        build_config({**content, "model": 3})


@pytest.mark.parametrize(
    ("place", "suggestion"),
    [
        (("model", "hiden_size"), "did you mean model.hidden_size?"),
        (("model", "lr"), "did you mean optimizer.lr?"),
        (("optimizer", "train_iters"), "did you mean train.train_iters?"),
        (("seed",), "did you mean train.seed?"),
        (("optimiser",), "did you mean optimizer?"),
        (("model", "qqq"), "--help lists its keys"),
        (("qqq",), "the sections are model, precision, parallel, train"),
    ],
)
def test_unknown_key_gets_a_suggestion(content, place, suggestion):
    inner = content
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = 1
    with pytest.raises(InputError) as caught:
        build_config(content)
    assert f"unknown key {'.'.join(place)}: {suggestion}" in str(caught.value)
