"""The same runs on a GPU, which several ranks share: gloo moves their bytes through the host."""

from __future__ import annotations

import pytest
import torch

from tests.training.runs import APART, LLAMA, curve, train

pytestmark = pytest.mark.gpu

SMALL = {"micro_batch_size": 1, "global_batch_size": 8, "eval_iters": 2}
LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2 tp2 sp even": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "partition": "even"},
    ),
}


def losses(folder):
    return torch.tensor([line["lm loss"] for line in curve(folder) if "lm loss" in line])


# FP8 rounds as on the CPU; GEMMs round their sums otherwise, bf16's 2^-8 each.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["bf16", "o3", "o3_long", "o4"])
def test_curve_is_that_of_the_cpu(layout, preset, tiny_config, run_distributed, folders, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    sections = {"train": SMALL, "precision": {"preset": preset}, "model": LLAMA}

    def run(name, count, keys, device):
        made = folders(name)  # the last step saves, so that amaxes are shared and weights gathered
        config = tiny_config(sections, {"parallel": keys}, made)
        run_distributed(train, count, config, device, timeout=120)
        return losses(tmp_path / name)

    cpu, gpu = run("cpu", 1, {}, "cpu"), run("gpu", ranks, parallel, "cuda")
    assert cpu[7] < 0.9 * cpu[0]
    assert ((gpu - cpu).abs() / cpu).max() < 0.03


@pytest.mark.parametrize("layout", ["one", "tp2 sp"])
def test_curve_of_documents_apart(layout, tiny_config, run_distributed, folders, tmp_path):
    curves = []
    for name, (ranks, parallel), device in (
        ("cpu", LAYOUTS["one"], "cpu"),
        ("gpu", LAYOUTS[layout], "cuda"),
    ):
        sections = {"train": SMALL, "model": LLAMA, "parallel": parallel}
        config = tiny_config(sections, APART, folders(name))
        run_distributed(train, ranks, config, device, timeout=120)
        curves.append(losses(tmp_path / name))
    cpu, gpu = curves
    assert cpu[7] < 0.9 * cpu[0]
    assert ((gpu - cpu).abs() / cpu).max() < 0.03
