"""Names of tensors in a checkpoint: every one that a run stores parses, and comes out the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp8lm.checkpoint import StateKey
from fp8lm.config import PrecisionConfig
from fp8lm.config.precision import PRESETS
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.model import GPTModel
from fp8lm.training.state import model_shards
from tests.model.tiny import SHAPES, VOCABULARY, model_config

KEPT = Path(__file__).parent / "kept"
WEIGHT = "decoder.layers.0.mlp.linear_fc1.weight"
NAMES = {
    f"model.{WEIGHT}.payload": StateKey("weight", WEIGHT, "payload"),
    f"model.{WEIGHT}.scale": StateKey("weight", WEIGHT, "scale"),
    f"optimizer.master.{WEIGHT}.payload": StateKey("master", WEIGHT, "payload"),
    f"optimizer.exp_avg.{WEIGHT}.scale": StateKey("exp_avg", WEIGHT, "scale"),
    f"optimizer.exp_avg_sq.{WEIGHT}.payload": StateKey("exp_avg_sq", WEIGHT, "payload"),
    f"optimizer.amax.{WEIGHT}": StateKey("amax", WEIGHT),
    f"gradient.mu.{WEIGHT}": StateKey("mu", WEIGHT),
    "optimizer.num_steps": StateKey("num_steps"),
    "window": StateKey("window"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_ones_on_disk(name):
    assert str(NAMES[name]) == name
    assert StateKey.parse(name) == NAMES[name]


@pytest.mark.parametrize(
    "expected", sorted(KEPT.glob("*/expected.json")), ids=lambda path: path.parent.name
)
def test_every_name_that_an_earlier_version_wrote_parses(expected):
    for kind in json.loads(expected.read_text()).values():
        for name in kind["tensors"]:
            assert str(StateKey.parse(name)) == name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_every_preset_comes_out_the_same(preset, shape):
    precision = PrecisionConfig(preset=preset)
    recipe = Recipe.from_config(precision, ReferenceKernels(), torch.device("meta"))
    params = named_params(GPTModel(model_config(**SHAPES[shape]), VOCABULARY, recipe))
    keys = list(model_shards(params))
    keys += [
        StateKey(kind, name, field)
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name in params
        for field in ("payload", "scale")
    ]
    keys += [StateKey(kind, name) for kind in ("amax", "mu") for name in params]
    names = {str(key): key for key in keys}
    assert len(names) == len(keys)
    assert all(StateKey.parse(name) == key for name, key in names.items())


@pytest.mark.parametrize(
    "name",
    (
        *("", "a", "model", "model.", "model.payload", "model.w", "model..payload", "model.w.code"),
        *("optimizer.lr.w", "optimizer.master.w", "optimizer.num_steps.w", "windows", "window.w"),
    ),
)
def test_other_names_are_no_keys(name):
    assert StateKey.parse(name) is None


@pytest.mark.parametrize(
    "key", [("weight", "w"), ("amax", "w", "payload"), ("window", "w"), ("amax",), ("m", "w")]
)
def test_a_key_that_could_not_be_parsed_is_refused(key):
    with pytest.raises(ValueError, match="no tensor of a training state"):
        StateKey(*key)
