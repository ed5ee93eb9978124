"""Every recipe of scales and formats under parallel layouts, against one process."""

from __future__ import annotations

import pytest
import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import differences, read_tensor, stored_tensors
from tests.training.runs import curve, save_again, train

pytestmark = pytest.mark.slow

TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {"tp": TENSOR, "pp": {"pipeline_model_parallel_size": 2}, "dp": {"partition": "even"}}
ROWS = {"input": "row", "grad_output": "row"}
RECIPES = {
    "te": {"preset": "te"},
    "o3_long": {"preset": "o3_long"},
    "o4": {"preset": "o4"},
    "deepseek": {"preset": "deepseek"},
    "mxfp8": {"preset": "mxfp8"},
    "te_delayed": {"preset": "te_delayed"},
    "rows": {"preset": "te", "scaling": ROWS | {"weight": "row"}},
    "o3 delayed": {"preset": "o3", "scaling_method": "delayed", "fp8_amax_history_len": 2},
    "coat": {"preset": "coat"},
    "unit": {"preset": "unit"},
    "smooth": {"preset": "te", "smooth_swiglu": True},
    "o3 smooth": {"preset": "o3", "smooth_swiglu": True},
    "o3 rows": {"preset": "o3", "scaling": ROWS, "grad_output_format": "fp8_e4m3"},
}
# Largest relative difference of a loss from one process. The stages of a pipeline and replicas
# compute what one process does; tensor-parallel ranks round partial sums, and o3's wires, or
# coat's of gradients, round what they carry.
BOUNDS = {"tp": 0.01, "pp": 0.0, "dp": 0.0}
ROUNDING_WIRES = {"tp": 0.02, "pp": 0.02, "dp": 0.02}


def losses(folder):
    return torch.tensor([line["lm loss"] for line in curve(folder) if "lm loss" in line])


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_of_one_process(recipe, tiny_config, run_distributed, tmp_path):
    def run(name, ranks, parallel):
        changes = {
            # Every contraction has whole blocks of 128 on each of two ranks.
            "model": {"hidden_size": 256, "num_attention_heads": 2, "seq_length": 32}
            | {"swiglu": RECIPES[recipe].get("smooth_swiglu", False), "ffn_hidden_size": 512},
            "train": {"eval_iters": 0, "train_iters": 4},
            "optimizer": {"lr": 1e-3},
            "scheduler": {"lr_warmup_iters": 1},
            "precision": RECIPES[recipe],
            "parallel": parallel,
            "logging": {"dir": str(tmp_path / name), "log_interval": 1},
        }
        run_distributed(train, ranks, tiny_config(changes))
        return losses(tmp_path / name)

    one = run("one", 1, {})
    assert one[-1] < one[0]
    rounds = RECIPES[recipe]["preset"] in ("o3", "o3_long", "o4", "coat")
    bounds = ROUNDING_WIRES if rounds else BOUNDS
    for layout, parallel in LAYOUTS.items():
        difference = ((run(layout, 2, parallel) - one).abs() / one).max()
        assert difference <= bounds[layout], f"{layout}: {difference}"


# Those of the others have the states of te, of o3_long, and of te_delayed.
STORED = [name for name in RECIPES if name not in ("rows", "o3 rows", "o3 delayed")]


@pytest.mark.parametrize("recipe", STORED)
def test_every_byte_survives_every_layout(recipe, tiny_config, run_distributed, tmp_path):
    """Trained under TP2 and DP2; each layout loads what the one before it has saved."""

    def config(parallel, **checkpoint):
        changes = {
            # Two ranks with whole blocks of 128 of what they cut, in little memory.
            "model": {"hidden_size": 128, "num_attention_heads": 2, "kv_channels": 128}
            | {"swiglu": RECIPES[recipe].get("smooth_swiglu", False), "ffn_hidden_size": 256},
            "train": {"eval_iters": 0, "train_iters": 2},
            "scheduler": {"lr_warmup_iters": 1},
            "precision": RECIPES[recipe],
            "parallel": parallel,
            "checkpoint": {key: str(folder) for key, folder in checkpoint.items()},
        }
        return tiny_config(changes)

    start = former = tmp_path / "trained"
    run_distributed(train, 4, config(LAYOUTS["tp"] | LAYOUTS["dp"], save=start))
    for number, name in enumerate(("pp", "one", "tp", "dp", "one")):
        again, folder = config(LAYOUTS.get(name, {}), load=former), tmp_path / str(number)
        run_distributed(save_again, 1 if name == "one" else 2, again, str(folder))
        assert list(differences(open_checkpoint(start), open_checkpoint(folder))) == [], name
        former = folder


DELAYED = {"preset": "te_delayed", "fp8_amax_history_len": 3}


def histories(folder):
    checkpoint = open_checkpoint(folder)
    return {
        name: read_tensor(checkpoint, stored)
        for name, stored in stored_tensors(checkpoint).items()
        if name.startswith("scaling.amax_history.")
    }


def test_histories_are_one_for_every_tensor_under_every_layout(
    tiny_config, run_distributed, tmp_path
):
    def config(name, parallel, **checkpoint):
        changes = {
            "train": {"eval_iters": 0, "train_iters": 4},
            "optimizer": {"lr": 1e-3},
            "precision": DELAYED,
            "parallel": parallel,
            "checkpoint": {"save": str(tmp_path / name), **checkpoint},
        }
        return tiny_config(changes)

    run_distributed(train, 1, config("one", {}))
    one = histories(tmp_path / "one")
    # Two layers of four linear layers, in each an input, a weight and an output gradient.
    assert len(one) == 2 * 4 * 3 and all(history.shape == (3,) for history in one.values())
    assert all((history > 0).all() for history in one.values())
    assert any(len(history.unique()) == 3 for history in one.values())  # one of each step
    for layout, parallel in LAYOUTS.items():
        run_distributed(train, 2, config(layout, parallel))
        found = histories(tmp_path / layout)
        assert found.keys() == one.keys()
        # Tensor-parallel ranks round partial sums. The stages and replicas compute the same bits.
        bound = 0.1 if layout == "tp" else 0.0
        for name, history in found.items():
            torch.testing.assert_close(history, one[name], rtol=bound, atol=0.0)
    again = config("tp", {}, load=str(tmp_path / "tp"))
    run_distributed(save_again, 1, again, str(tmp_path / "again"))
    tp, again = (open_checkpoint(tmp_path / name) for name in ("tp", "again"))
    assert not list(differences(tp, again))


def test_a_weight_stored_in_fp8_has_no_history(train_run, tiny_config):
    changes = {
        "train": {"eval_iters": 0, "train_iters": 1},
        "precision": {"preset": "o3", "scaling_method": "delayed"},
        "scheduler": {"lr_warmup_iters": 0},
    }
    held = train_run(tiny_config(changes)).run.histories
    assert {kind for _, kind in held.by_key} == {"input", "grad_output"}


def test_a_history_of_another_length_starts_anew(tiny_config, run_distributed, tmp_path):
    folder = str(tmp_path / "run")

    def run(length, steps):
        changes = {
            "train": {"eval_iters": 0, "train_iters": 4, "exit_interval": steps},
            "precision": DELAYED | {"fp8_amax_history_len": length},
            "checkpoint": {"save": folder, "load": folder},
        }
        run_distributed(train, 1, tiny_config(changes))
        return histories(folder)

    run(3, 2)
    for history in run(5, 3).values():
        assert history.shape == (5,) and (history > 0).tolist() == [True] + 4 * [False]
