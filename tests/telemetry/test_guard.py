"""The guard: names what leaves its bounds, moves layers to BF16 and back, the same everywhere."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.config.guard import GuardConfig
from fp8lm.numerics import BF16, E4M3
from fp8lm.runtime.errors import RunFailed
from fp8lm.telemetry.guard import Guard
from fp8lm.telemetry.observing import linears_of
from fp8lm.training.state import model_tensors, optimizer_tensors
from tests.model.tiny import build
from tests.training.runs import curve, read, trainer_of

KURTOSIS = 30.0  # which gradients of this model exceed in some steps, and not in others
COUNT = "fp8_stats/layers_in_bf16"
FC2 = "decoder.layers.0.mlp.linear_fc2"
LAYER, OTHER = "decoder.layers.1.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc1"
GOOD = {"snr": 31.0, "underflow": 0.0, "saturation": 0.0, "kurtosis": 3.0}
BAD = GOOD | {"saturation": 0.5}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def statistics(values, kind="input"):
    return {(LAYER, kind): values, (OTHER, kind): GOOD}


def guard(action="bf16", **bounds):
    linears = linears_of([build({}, {"preset": "o3"})])
    return Guard(GuardConfig(action=action, **bounds), linears), linears


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"underflow": 0.3}, "underflow"),
        ({"saturation": 0.3}, "saturation"),
        ({"kurtosis": 300.0}, "kurtosis"),
        ({"snr": 3.0}, "snr"),
    ],
)
def test_a_warning_names_layer_tensor_and_bound(values, named):
    watcher, linears = guard("warn", max_kurtosis=100)
    (line,) = watcher.check(statistics(GOOD | values, "grad_output"))
    for text in (LAYER, "grad_output", named, "precision.guard."):
        assert text in line
    assert watcher.check(statistics(GOOD | values, "grad_output")) == []  # said once
    assert watcher.check(statistics(GOOD)) == []
    assert len(watcher.check(statistics(GOOD | values))) == 1
    assert linears[LAYER].quantizers["input"].format == E4M3


def test_what_no_gemm_reads_is_left_alone():
    watcher, _ = guard()
    assert watcher.check(statistics(BAD, "exp_avg")) == []


def test_a_layer_moves_and_returns():
    watcher, linears = guard(patience=2, return_after=2)
    recipe = linears[LAYER].quantizers
    assert watcher.check(statistics(BAD)) == []
    assert len(watcher.check(statistics(BAD))) == 1 and watcher.in_bf16 == {LAYER}
    assert {q.format for q in linears[LAYER].quantizers.values()} == {BF16}
    assert {q.format for q in linears[OTHER].quantizers.values()} != {BF16}
    for values in (GOOD, BAD, GOOD):
        assert watcher.check(statistics(values)) == []
    assert len(watcher.check(statistics(GOOD))) == 1 and not watcher.in_bf16
    assert linears[LAYER].quantizers == recipe  # with all that they have learned


def test_state_goes_through_json():
    watcher, _ = guard(patience=2)
    watcher.check(statistics(BAD))
    watcher.check(statistics(BAD))
    again, linears = guard(patience=2)
    again.restore(json.loads(json.dumps(watcher.state)))
    assert again.in_bf16 == {LAYER} and again.state == watcher.state
    assert linears[LAYER].quantizers["input"].format == BF16
    again.restore(None)
    assert not again.in_bf16 and linears[LAYER].quantizers["input"].format == E4M3


def clipped(trainer):
    """Inputs of one layer keep a scale for 2^-10, as a frozen scale of delayed scaling would."""
    linear = linears_of(trainer.run.chunks).get(LAYER)
    if linear is not None:
        quantizer = linear.recipe_quantizers["input"]
        quantizer.share_amax = lambda amax: torch.full_like(amax, 2.0**-10)


def guarded(config):
    """Train with that fault; this rank's decisions."""
    with trainer_of(config) as trainer:
        clipped(trainer)
        trainer.train()
        in_bf16 = {
            name
            for name, linear in linears_of(trainer.run.chunks).items()
            if linear.quantizers["input"].format == BF16
        }
        return trainer.guard.state, in_bf16


@pytest.fixture
def config(tiny_config, tmp_path):
    def make(folder, *changes, guard=None):
        logging = {"dir": str(tmp_path / folder), "log_interval": 1}
        sections = {"logging": logging, "train": {"train_iters": 12, "eval_iters": 1}}
        if guard is not None:
            sections["logging"] |= {"fp8_stats_interval": 2}
            sections["precision"] = {"guard": guard}
        return tiny_config(sections, {"scheduler": {"lr_warmup_iters": 0}}, *changes)

    return make


@pytest.mark.slow
def test_a_healthy_run_is_the_same_bit_for_bit(config, train_run, tmp_path):
    states = []
    for name, action in (("plain", None), ("guarded", {"action": "bf16"})):
        run = train_run(config(name, guard=action)).run
        states.append(model_tensors(run.weights) | optimizer_tensors(run.optimizer))
    assert all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items())
    plain, guarded_run = (
        [line for line in curve(tmp_path / name) if not any("fp8_stats" in key for key in line)]
        for name in ("plain", "guarded")
    )
    assert plain == guarded_run
    assert {line.get("fp8_stats/layers_in_bf16") for line in read(tmp_path / "guarded")} == {
        None,
        0,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (2, TP2), (2, {"pipeline_model_parallel_size": 2}), (2, {})],
    ids=["one", "tp2", "pp2", "dp2"],
)
def test_all_ranks_decide_alike(ranks, parallel, config, run_distributed, tmp_path):
    bounds = {"action": "bf16", "return_after": None}
    changes = {"parallel": parallel, "train": {"micro_batch_size": 1}}
    results = run_distributed(guarded, ranks, config("run", changes, guard=bounds))
    states = [state for state, _ in results]
    assert all(state == states[0] for state in states) and states[0]["within"].keys() == {LAYER}
    assert set().union(*(moved for _, moved in results)) == {LAYER}
    counts = [line.get("fp8_stats/layers_in_bf16") for line in read(tmp_path / "run")]
    assert [count for count in counts if count is not None] == [1] * 6


@pytest.mark.slow
def test_decisions_are_in_the_checkpoint(config, train_run, tmp_path):
    folder = str(tmp_path / "saved")
    bounds = {"action": "bf16", "return_after": 100}
    checkpoint = {"checkpoint": {"save": folder, "load": folder, "save_interval": 4}}
    first = train_run(config("run", checkpoint, guard=bounds), clipped)
    whole = first.guard.state
    assert whole["within"] == {LAYER: 0} and LAYER in first.guard.in_bf16
    kept = open_checkpoint(tmp_path / "saved/iter_0000008")
    assert kept.common["guard"] == {"outside": {}, "within": {LAYER: 0}}
    at_eight = {"checkpoint": {"load": f"{folder}/iter_0000008"}}
    resumed = train_run(config("again", at_eight, guard=bounds), clipped)
    assert resumed.guard.state == whole
    losses = [
        [x["lm loss"] for x in read(tmp_path / n) if "lm loss" in x] for n in ("run", "again")
    ]
    assert losses[0][8:] == losses[1]


@pytest.mark.slow
def test_histories_of_delayed_scaling_follow_decisions_through_a_checkpoint(
    config, train_run, tmp_path
):
    """Layers move to BF16 and return before and after the checkpoint; every bit is the same."""
    folder = str(tmp_path / "saved")
    often = {"action": "bf16", "max_kurtosis": KURTOSIS, "return_after": 1}
    sections = {
        "precision": {"preset": "te_delayed", "fp8_amax_history_len": 4, "guard": often},
        "train": {"train_iters": 16},
    }
    saving = {"checkpoint": {"save": folder, "load": folder, "save_interval": 6}}
    first = train_run(config("run", sections, saving, guard=often))
    at_six = {"checkpoint": {"load": f"{folder}/iter_0000006"}}
    resumed = train_run(config("again", sections, at_six, guard=often))
    assert resumed.guard.state == first.guard.state
    for of in (
        lambda run: model_tensors(run.weights) | optimizer_tensors(run.optimizer),
        lambda run: run.histories.by_key,
    ):
        expected, found = of(first.run), of(resumed.run)
        assert expected.keys() == found.keys() != set()
        assert all(torch.equal(expected[key], tensor) for key, tensor in found.items())
    whole, rest = curve(tmp_path / "run"), curve(tmp_path / "again")
    assert [line for line in whole if line["iteration"] > 6] == rest
    in_bf16 = [line[COUNT] for line in whole if COUNT in line]
    moves = [after - before for before, after in pairwise([0, *in_bf16])]
    for part in (moves[:3], moves[3:]):  # of iterations 2, 4, 6 and of those behind them
        assert min(part) < 0 < max(part)
    for line in rest:
        weights = [key for key in line if key.endswith("weight/snr")]
        assert len(weights) == (2 * 4 + 1 if COUNT in line else 0)  # also of layers in BF16


class FirstAmax:
    """Delayed scaling without patience: the first amax stays, and what is beyond it is no number.

    As with formats that have an infinity, where casts do not saturate.
    """

    def __init__(self):
        self.kept = None

    def __call__(self, amax):
        self.kept = amax.clone() if self.kept is None else self.kept
        return torch.where(amax > 1.5 * self.kept, torch.nan, self.kept)


def delayed(trainer):
    linears_of(trainer.run.chunks)[FC2].quantizers["input"].share_amax = FirstAmax()


@pytest.mark.slow
def test_a_run_that_ends_without_it_is_rescued(config, train_run, tmp_path):
    """Activations outgrow a scale that does not follow: every step is skipped from then on."""
    long = {"train": {"train_iters": 40, "max_consecutive_skips": 5}}
    with pytest.raises(RunFailed, match="skipped"):
        train_run(config("unguarded", long), delayed)
    bounds = {"action": "bf16", "return_after": None}
    trainer = train_run(config("guarded", long, guard=bounds), delayed)
    assert trainer.guard.in_bf16 == {FC2} and trainer.progress.iteration == 40
    train_run(config("healthy", long))
    reports = {
        name: [line for line in read(tmp_path / name) if "lm loss" in line]
        for name in ("guarded", "healthy", "unguarded")
    }
    skipped = sum(line["skipped iterations"] for line in reports["guarded"])
    assert 0 < skipped <= 2 < reports["unguarded"][-1]["iteration"] < 40
    last = {name: lines[-1]["lm loss"] for name, lines in reports.items()}
    assert abs(last["guarded"] / last["healthy"] - 1) < 0.05
    assert last["guarded"] < 0.7 * reports["guarded"][0]["lm loss"]
