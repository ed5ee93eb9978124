"""Interrupted and resumed equals uninterrupted: every later report, every byte of state."""

from __future__ import annotations

import re

import pytest
import torch

from fp8lm.checkpoint import find_checkpoint, open_checkpoint
from fp8lm.checkpoint.files import saved_iterations, write_latest
from fp8lm.checkpoint.reader import differences, stored_tensors
from fp8lm.config import PRESETS
from fp8lm.runtime.errors import InputError, run_command
from fp8lm.training.config_diff import changed_keys
from fp8lm.training.state import model_tensors, optimizer_tensors
from tests.checkpoint.tensors import file_size_limit
from tests.training.runs import APART, curve, train

pytestmark = pytest.mark.slow

TIMING = {"iteration-time", "throughput", "tokens-per-second", "timestamp"}

VARIANTS = {
    "o3": {"precision": {"preset": "o3"}},
    "asynchronous": {"checkpoint": {"async_save": True}},
    "nearest master": {"precision": {"preset": "o3", "master_rounding": "nearest"}},
    "dropout": {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}},
    "dropout, full recompute": {
        "model": {"hidden_dropout": 0.1},
        "train": {"recompute_granularity": "full"},
    },
    "batch ramp-up": {
        "train": {"train_samples": 28, "rampup_batch_size": [2, 2, 12], "train_iters": None},
        "scheduler": {"lr_warmup_iters": 0, "lr_warmup_samples": 4},
    },
    "documents": APART | {"train": {"recompute_granularity": "selective"}},
    "llama": {
        "model": {
            "normalization": "RMSNorm",
            "swiglu": True,
            "disable_bias_linear": True,
            "num_query_groups": 1,
            "untie_embeddings_and_output_weights": True,
        }
    },
}


# Interleaved stages, dropout, recomputation, a ramp-up that ends after the interruption.
EVERYTHING = (
    {"model": {"num_layers": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1}},
    {
        "train": {
            "train_samples": 16,
            "train_iters": None,
            "rampup_batch_size": [2, 2, 8],
            "micro_batch_size": 1,
            "recompute_granularity": "selective",
        },
        "scheduler": {"lr_warmup_iters": 0, "lr_warmup_samples": 4},
    },
    {
        "parallel": {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
        },
        "checkpoint": {"async_save": True, "save_interval": 2, "keep_last": 2},
    },
)


RECIPES = {preset: {"preset": preset} for preset in PRESETS} | {
    "o3 smooth": {"preset": "o3", "smooth_swiglu": True}
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_with_everything_on(recipe, tiny_config, run_distributed, folders, tmp_path):
    def config(run, **train):
        precision = RECIPES[recipe] | {"master_rounding": "stochastic"}
        changes = {
            "model": {"swiglu": precision.get("smooth_swiglu", False)},
            "precision": precision,
            "train": train,
        }
        return tiny_config(*EVERYTHING, folders(run), changes)

    whole = run_distributed(train, 2, config("whole"))
    run_distributed(train, 2, config("parts", exit_interval=3))
    parts = run_distributed(train, 2, config("parts"))
    for (expected, _), (state, _) in zip(whole, parts, strict=True):
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    found = [open_checkpoint(tmp_path / run) for run in ("whole", "parts")]
    assert not list(differences(*found))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    sizes = [line["batch-size"] for line in curve(tmp_path / "whole") if "batch-size" in line]
    assert sizes[0] == 2 and sizes[-1] == 4
    assert not any(line.get("skipped iterations") for line in curve(tmp_path / "whole"))


def comparable(lines):
    """Reports without what measures time or memory."""
    return [
        {key: value for key, value in line.items() if key not in TIMING and "memory" not in key}
        for line in lines
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_equals_uninterrupted(name, tiny_config, train_run, read_metrics, tmp_path):
    def config(run, **train):
        folders = {
            "checkpoint": {key: str(tmp_path / run / "ck") for key in ("save", "load")},
            "logging": {"dir": str(tmp_path / run)},
        }
        return tiny_config(VARIANTS[name], folders, {"train": train})

    whole = train_run(config("whole"))
    train_run(config("parts", exit_interval=4))
    # Whatever else drew random numbers in between must not matter.
    torch.manual_seed(0)
    resumed = train_run(config("parts"))

    for tensors in (
        lambda run: model_tensors(run.weights),
        lambda run: optimizer_tensors(run.optimizer),
    ):
        expected, actual = tensors(whole.run), tensors(resumed.run)
        assert expected.keys() == actual.keys()
        different = [key for key in expected if not torch.equal(expected[key], actual[key])]
        assert not different
    expected = comparable(read_metrics(tmp_path / "whole"))
    assert comparable(read_metrics(tmp_path / "parts")) == expected
    assert len(expected) > 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"num_layers": 3}}, "layers.2"),
        ({"model": {"hidden_size": 64}}, "expected"),
        (
            {"model": {"num_layers": 3}, "parallel": {"partition": "even"}},
            'since then: model.num_layers = 3 .was 2.*, parallel.partition = "even" .was "tensor"',
        ),
        # All tensors fit here, and would be read as something else.
        ({"model": {"num_attention_heads": 4}}, r"model.num_attention_heads = 4 \(was 2\)"),
        ({"model": {"use_parallel_residual": True}}, "another model: model.use_parallel_residual"),
        (
            {"model": {"position_embedding_type": "none"}},
            r'another model: model.position_embedding_type = "none" \(was "rope"\)$',
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, named, tiny_config, train_run, tmp_path):
    folders = {"checkpoint": {key: str(tmp_path) for key in ("save", "load")}}
    train_run(tiny_config(folders, {"train": {"train_iters": 4}}))
    with pytest.raises(InputError, match=named):
        train_run(tiny_config(folders, change))


def test_what_the_config_changes_is_told(tiny_config, train_run, tmp_path, capsys):
    folders = {"checkpoint": {key: str(tmp_path) for key in ("save", "load")}}
    train_run(tiny_config(folders, {"train": {"exit_interval": 4}}))
    train = {"exit_interval": 6, "seed": 7, "calculate_per_token_loss": False}
    changes = {"train": train, "optimizer": {"lr": 5e-3}}
    capsys.readouterr()
    train_run(tiny_config(folders, changes))
    # min_lr is a tenth of lr unless given. How long this start trains is not what it trains.
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "note:" in line)
    assert re.findall(r"[\w.]+ = \S+ \(was \S+\)", note) == [
        "optimizer.lr = 0.005 (was 0.01)",
        "optimizer.min_lr = 0.0005 (was 0.001)",
        "train.seed = 7 (was 1234)",
        "train.calculate_per_token_loss = false (was true)",
    ]
    del train["exit_interval"]
    train_run(tiny_config(folders, changes))
    assert "note:" not in capsys.readouterr().out


def test_going_back_by_hand_leaves_the_other_past_alone(tiny_config, train_run, tmp_path, capsys):
    folders = {"checkpoint": {key: str(tmp_path) for key in ("save", "load")}}
    every = {"checkpoint": {"save_interval": 2, "keep_last": 2}}
    train_run(tiny_config(folders, {"checkpoint": {"save_interval": 2}}))
    write_latest(tmp_path, 4)
    capsys.readouterr()
    train_run(tiny_config(folders, every, {"optimizer": {"lr": 1e-3}, "train": {"train_iters": 6}}))
    out = capsys.readouterr().out
    assert "checkpoints 6, 8 are newer" in out
    assert saved_iterations(tmp_path) == [6, 4]
    assert saved_iterations(tmp_path / "set_aside") == [8, 6]
    lr = {
        place: find_checkpoint(place).common["config"]["optimizer"]["lr"]
        for place in (tmp_path, tmp_path / "set_aside")
    }
    assert lr == {tmp_path: 1e-3, tmp_path / "set_aside": 1e-2}


def test_checkpoints_of_another_run_are_not_replaced(tiny_config, train_run, tmp_path):
    save = {"checkpoint": {"save": str(tmp_path), "save_interval": 2, "keep_last": 1}}
    train_run(tiny_config(save))
    with pytest.raises(InputError, match="up to iteration 8"):
        train_run(tiny_config(save, {"train": {"train_iters": 3}}))
    assert saved_iterations(tmp_path) == [8]


def test_a_last_checkpoint_without_room_is_one_line(tiny_config, train_run, tmp_path, capsys):
    config = tiny_config({"checkpoint": {"save": str(tmp_path)}})
    with file_size_limit(1000):
        code = run_command(lambda _: train_run(config))
    lines = capsys.readouterr().err.splitlines()
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("error: ") and "iteration 8" in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outer", ["first", "last"])
def test_mu_where_a_stage_has_none(outer, tiny_config, run_distributed, folders, tmp_path):
    """One stage has the BF16 layer alone, and nothing of what the reduction remembers."""
    base = (
        {"model": {"num_layers": 3}},
        {"train": {"micro_batch_size": 1, "train_iters": 4, "eval_iters": 0}},
        {"precision": {"grad_reduce": "fp8_sum", "first_last_layers_bf16": True}},
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                f"decoder_{outer}_pipeline_num_layers": 1,
            }
        },
    )
    run_distributed(train, 4, tiny_config(*base, folders("whole")))
    run_distributed(train, 4, tiny_config(*base, folders("parts"), {"train": {"exit_interval": 2}}))
    run_distributed(train, 4, tiny_config(*base, folders("parts")))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert "fp8/mu/min" in curve(tmp_path / "whole")[-1]
    found = [open_checkpoint(tmp_path / name) for name in ("whole", "parts")]
    assert any("gradient.mu." in name for name in stored_tensors(found[0]))
    assert not list(differences(*found))


def test_mu_of_another_model_does_not_let_it_pass(tiny_config, train_run, tmp_path):
    folders = {"checkpoint": {key: str(tmp_path) for key in ("save", "load")}}
    remembering = {"precision": {"grad_reduce": "fp8_sum"}}
    train_run(tiny_config(folders, remembering, {"model": {"num_layers": 3}}))
    train_run(tiny_config(folders, {"model": {"num_layers": 3}}, {"train": {"train_iters": 9}}))
    with pytest.raises(InputError, match=r"layers\.2"):
        train_run(tiny_config(folders))


def test_a_key_of_another_version_is_no_change(tiny_config):
    config = tiny_config().model_dump(mode="json")
    older = {name: dict(keys) for name, keys in config.items()}
    del older["optimizer"]["clip_grad"], older["tokenizer"]
    older["model"]["of_former_times"] = 1
    assert changed_keys(older, config) == []


def test_a_different_seed_gives_a_different_run(tiny_config, train_run):
    """The comparison above can fail: state does depend on what is resumed."""
    one, two = (train_run(tiny_config({"train": {"seed": seed}})) for seed in (1, 2))
    tensors = model_tensors(one.run.weights), model_tensors(two.run.weights)
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_one_checkpoint_is_gone_on_from_exactly(tiny_config, train_run, folders, tmp_path, capsys):
    train_run(tiny_config(folders("first"), {"checkpoint": {"save_interval": 2}}))
    config = tiny_config(folders("second", load="first/iter_0000004"))
    capsys.readouterr()
    train_run(config)
    assert "loaded checkpoint of iteration 4" in capsys.readouterr().out
    assert (
        curve(tmp_path / "second") == curve(tmp_path / "first")[-len(curve(tmp_path / "second")) :]
    )
    assert saved_iterations(tmp_path / "first") == [8, 6, 4, 2]
    found = [find_checkpoint(tmp_path / run) for run in ("first", "second")]
    assert not list(differences(*found))
