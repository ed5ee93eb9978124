"""Every recipe of scales and formats under parallel layouts, against one process."""

from __future__ import annotations

import pytest
import torch

from tests.training.runs import curve, train

pytestmark = pytest.mark.slow

TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {"tp": TENSOR, "pp": {"pipeline_model_parallel_size": 2}, "dp": {"partition": "even"}}
ROWS = {"input": "row", "grad_output": "row"}
RECIPES = {
    "deepseek": {"preset": "deepseek"},
    "mxfp8": {"preset": "mxfp8"},
    "rows": {"preset": "te", "scaling": ROWS | {"weight": "row"}},
    "o3 rows": {"preset": "o3", "scaling": ROWS, "grad_output_format": "fp8_e4m3"},
}
# Largest relative difference of a loss from one process. The stages of a pipeline and replicas
# compute what one process does; tensor-parallel ranks round partial sums, and o3's wires round
# what they carry.
BOUNDS = {"tp": 0.01, "pp": 0.0, "dp": 0.0}
FP8_WIRES = {"tp": 0.02, "pp": 0.02, "dp": 0.02}


def losses(folder):
    return torch.tensor([line["lm loss"] for line in curve(folder) if "lm loss" in line])


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_of_one_process(recipe, tiny_config, run_distributed, tmp_path):
    def run(name, ranks, parallel):
        changes = {
            # Every contraction has whole blocks of 128 on each of two ranks.
            "model": {"hidden_size": 256, "num_attention_heads": 2, "seq_length": 32},
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
    bounds = FP8_WIRES if RECIPES[recipe]["preset"] == "o3" else BOUNDS
    for layout, parallel in LAYOUTS.items():
        difference = ((run(layout, 2, parallel) - one).abs() / one).max()
        assert difference <= bounds[layout], f"{layout}: {difference}"
