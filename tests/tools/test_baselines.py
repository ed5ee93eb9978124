"""What tools/bench_step.py times this project against: the same model in other programs' layers."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import named_params
from fp8lm.runtime.errors import InputError
from fp8lm.training.builders import build_one_process
from tests.launch.conftest import ROOT
from tests.training.literal_replay import LiteralReplay

CPU = torch.device("cpu")
SIZES = ["--hidden-size=64", "--num-layers=2", "--num-attention-heads=2", "--seq-length=32"]
SIZES += ["--micro-batch-size=2", "--vocab-size=128"]
NARROW = ["--kv-channels=16", "--ffn-hidden-size=96"]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import baselines
    import bench_step

    yield baselines, bench_step
    for name in ("baselines", "bench_step", "plain_gpt"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("widths", [[], NARROW])
def test_the_models_are_of_one_size(tools, widths):
    _, bench_step = tools
    options = bench_step.parse_options([*SIZES, *widths])
    config = bench_step.make_config(options, "bf16")
    model, _ = build_one_process(config, options.vocab_size, ReferenceKernels(), CPU)
    expected = sum(each.model_param.payload.numel() for each in named_params(model).values())
    assert sum(each.numel() for each in bench_step.plain_model(options).parameters()) == expected


def test_graphs_take_the_same_steps(tools):
    _, bench_step = tools
    options = ["--presets=o3", "--baselines=none", "--num-microbatches=2", "--cuda-graphs"]
    capture = LiteralReplay()
    contestants = bench_step.build_contestants(
        bench_step.parse_options([*SIZES, *options]), CPU, lambda device: capture
    )
    losses = {
        name: [contestant.step().item() for _ in range(3)]
        for name, contestant in contestants.items()
    }
    assert losses["o3"] == losses["o3 graphs"] and len(contestants) == 2
    assert capture.replays == 4  # the first step is not captured
    of_eager, of_graphs = bench_step.profile(contestants, CPU).split("o3 graphs\n")
    assert of_eager.startswith("o3\n") and "aten::mm" in of_eager and "aten::mm" in of_graphs


def test_a_step_is_its_optimizer_and_its_micro_batches(tools, run_tool, tmp_path):
    output = tmp_path / "bench.json"
    options = [*SIZES, "--presets=o3", "--num-microbatches=2", "--steps=1", "--device=cpu"]
    assert run_tool("bench_step", *options, "--output", output) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == ["plain PyTorch", "o3"]
    for row in rows:
        assert row["optimizer_ms"] > 0
        parts = row["optimizer_ms"] + 2 * row["microbatch_ms"]
        assert parts == pytest.approx(row["ms"])


def test_an_update_takes_no_gradients_away(tools):
    _, bench_step = tools
    options = bench_step.parse_options([*SIZES, "--presets=o3"])
    for contestant in bench_step.build_contestants(options, CPU).values():
        first = contestant.step()
        contestant.update()  # again, on the same gradients
        contestant.update()
        assert contestant.step() < first


def test_what_is_not_there(tools):
    baselines, bench_step = tools
    model = bench_step.plain_model(bench_step.parse_options(SIZES))
    with pytest.raises(InputError, match="torchao_blockwise is none of plain, compiled"):
        baselines.build_baseline("torchao_blockwise", model)
    with pytest.raises(InputError, match="transformer_engine cannot be imported"):
        baselines.build_baseline("te_current", model)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_torchao_computes_the_same_model_in_fp8(tools, recipe):
    pytest.importorskip("torchao")
    baselines, bench_step = tools
    options = bench_step.parse_options(SIZES)
    model, (batch,) = bench_step.plain_model(options), bench_step.make_batch(options, CPU)
    expected = model(batch.tokens).float()
    with torch.compiler.set_stance("force_eager"):
        got = baselines.build_baseline(f"torchao_{recipe}", model)(batch.tokens).float()
    error = (got - expected).norm() / expected.norm()
    assert 0.002 < error < 0.1  # 0.004 is BF16's rounding; E4M3 has three bits of mantissa
