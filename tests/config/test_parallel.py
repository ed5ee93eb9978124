"""Sections `parallel` and `precision.wire`: what they default to and what they refuse."""

from __future__ import annotations

import pytest

from fp8lm.config import build_config, load_config
from fp8lm.runtime.errors import InputError


@pytest.mark.parametrize(
    ("preset", "wire"),
    [("bf16", "bf16"), ("te", "bf16"), ("o1", "fp8"), ("o2", "fp8"), ("o3", "fp8")],
)
def test_wires_of_the_presets(content, preset, wire):
    content["precision"] = {"preset": preset}
    config = build_config(content)
    assert (config.precision.wire.gather, config.precision.wire.reduce) == (wire, wire)


def test_one_wire_given(content, config_file):
    content["precision"] = {"wire": {"gather": "bf16", "reduce": None}}
    wire = build_config(content).precision.wire
    assert (wire.gather, wire.reduce) == ("bf16", "fp8")
    assert load_config(config_file, ["precision.wire.reduce=bf16"]).precision.wire.reduce == "bf16"


def test_another_preset_brings_its_wires(config_file, tmp_path):
    resolved = tmp_path / "resolved.yaml"
    load_config(config_file, ["precision.wire.gather=bf16"]).save_yaml(resolved)
    wire = load_config(resolved, ["precision.preset=te"]).precision.wire
    assert (wire.gather, wire.reduce) == ("bf16", "bf16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "precision.wire.gathr=fp8",
            "unknown key precision.wire.gathr: did you mean precision.wire.gather",
        ),
        ("precision.wire.gather=int8", 'precision.wire.gather = "int8": expected fp8 | bf16'),
        ("precision.wire=fp8", 'precision.wire = "fp8": expected a section of keys'),
    ],
)
def test_bad_wires(config_file, override, message):
    with pytest.raises(InputError) as caught:
        load_config(config_file, [override])
    assert message in str(caught.value)


TP = "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel=true"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SP], f"parallel.sequence_parallel = true needs {TP} > 1"),
        ([f"{TP}=8"], f"model.num_attention_heads = 4 is not divisible by {TP} = 8"),
        (
            [f"{TP}=4", "model.num_attention_heads=12", "model.num_query_groups=3"],
            f"model.num_query_groups = 3 and {TP} = 4: one must be a multiple of the other",
        ),
        (
            [f"{TP}=4", "model.ffn_hidden_size=130", "precision.preset=bf16"],
            f"model.ffn_hidden_size = 130 is not divisible by {TP} = 4",
        ),
        (
            [f"{TP}=2", "model.ffn_hidden_size=48"],
            f"model.ffn_hidden_size = 48 / {TP} = 2 is 24, not a multiple of 16",
        ),
        (
            [f"{TP}=4", SP, "model.seq_length=34", "precision.preset=bf16"],
            f"model.seq_length = 34 is not divisible by {TP} = 4",
        ),
        ([f"{TP}=0"], f"{TP} = 0: expected integer >= 1"),
    ],
)
def test_impossible_divisions(config_file, overrides, message):
    with pytest.raises(InputError) as caught:
        load_config(config_file, overrides)
    assert message in str(caught.value)


def test_possible_divisions(config_file):
    parallel = load_config(config_file, [f"{TP}=4", SP]).parallel
    assert (parallel.tensor_model_parallel_size, parallel.sequence_parallel) == (4, True)
    load_config(config_file, [f"{TP}=4", "model.seq_length=34", "precision.preset=bf16"])
    load_config(config_file, [f"{TP}=4", SP, "model.num_query_groups=2"])
