"""Statistics of a run on several ranks: those of all their tensors, and of one process."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fp8lm.config.checks.telemetry import observed_layers
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.telemetry import observing, statistics, table
from tests.telemetry.direct import differences, direct
from tests.training.runs import read, train, trainer_of

pytestmark = pytest.mark.slow

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2 without sp": (2, TP2 | {"sequence_parallel": False}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "dp2 without zero": (2, {"use_distributed_optimizer": False}),
}
# An FP8 gradient is sent as it is, that of an embedding in BF16.
WIRES = {
    "one": set(),
    "tp2": {*observing.REDUCED},
    "tp2 without sp": {*observing.REDUCED},
    "pp2": {"send"},
    "dp2": {"send_grad"},
    "dp2 without zero": {"send_grad"},
}


class Recorder(table.StatisticsTable):
    """A table that keeps the tensors that were measured, by row; one recorder a process."""

    def __init__(self, rows, device):
        super().__init__(rows, device)
        self.casts = {}

    def add(self, row, measured):
        self.casts.setdefault(row, []).append(measured.tensors)
        super().add(row, measured)


class Measured(tuple):
    """What measuring returns, with the tensors that it has seen."""


def keeping(function):
    """`function`, whose results know the tensors that were measured."""

    def measure_and_keep(x, quantized, kernels, **options):
        result = Measured(function(x, quantized, kernels, **options))
        payload, scale = quantized.payload.clone(), quantized.scale.clone()
        kept = ScaledTensor(payload, scale, quantized.format, quantized.granularity)
        result.tensors = x.detach().float().clone(), kept
        return result

    return measure_and_keep


def train_and_keep(config):
    """Train; all tensors of the last step that was observed, as (x, quantized) by row."""
    made = []

    def recorder(*arguments):
        made.append(Recorder(*arguments))
        return made[-1]

    with (
        mock.patch.object(observing, "measure", keeping(statistics.measure)),
        mock.patch.object(observing, "measure_all", keeping(statistics.measure_all)),
        mock.patch("fp8lm.training.hooks.telemetry.StatisticsTable", recorder),
        trainer_of(config) as trainer,
    ):
        trainer.train()
    return made[0].casts


def statistics_of(folder):
    """Those in metrics.jsonl, by row."""
    return next(found for line in read(folder) if (found := table.statistics_in(line)))


@pytest.fixture(scope="module")
def observed(run_distributed, tmp_path_factory):
    """Statistics of the first step of a layout, and the tensors of every rank."""
    made = {}

    def run(config, layout):
        if layout not in made:
            folder, (ranks, parallel) = tmp_path_factory.mktemp("run"), LAYOUTS[layout]
            logging = {"dir": str(folder), "fp8_stats_interval": 1}
            batch = {"train_iters": 1, "micro_batch_size": 1, "eval_iters": 0}
            schedule = {"scheduler": {"lr_warmup_iters": 0}}
            changed = config({"parallel": parallel, "logging": logging, "train": batch}, schedule)
            kept = run_distributed(train_and_keep, ranks, changed)
            made[layout] = statistics_of(folder), kept
        return made[layout]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_all_tensors(layout, tiny_config, observed):
    found, kept = observed(tiny_config, layout)
    rows = {row for casts in kept for row in casts}
    assert rows == found.keys()
    assert {layer for layer, _ in rows if "pipeline" not in layer} == set(
        observed_layers(tiny_config().model)
    )
    wires = {kind for _, kind in rows if kind.startswith(("reduce", "send"))}
    assert wires == WIRES[layout]
    for row in rows:
        casts = [cast for by_row in kept for cast in by_row.get(row, [])]
        assert not differences(found[row], direct(casts), 1e-3), row


# Sums of gradients are rounded for each rank, activations on their way in E4M3 at 31 dB: what is
# 3 % of a value may be more of the largest.
CLOSE = {"dp2": 0.05, "dp2 without zero": 0.05, "tp2": 0.2, "tp2 without sp": 0.2, "pp2": 0.2}


@pytest.mark.parametrize("layout", CLOSE)
def test_against_one_process(layout, tiny_config, observed):
    one, _ = observed(tiny_config, "one")
    several, _ = observed(tiny_config, layout)
    # A replica's gradient is the mean over its own micro-batches: its size depends on their number.
    compared = dict.fromkeys(("input", "weight", "master"), ("amax", "snr", "kurtosis"))
    compared |= dict.fromkeys(("grad_output", "exp_avg"), ("snr", "kurtosis"))
    rows = [row for row in one if row[1] in compared]
    for row in rows:
        expected = {name: one[row][name] for name in compared[row[1]] if name in one[row]}
        assert not differences(several[row], expected, CLOSE[layout]), row
    assert len(rows) == 2 * 4 * 5 + 3


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_a_bf16_run_tells_what_fp8_would_do_to_it(layout, tiny_config, run_distributed, tmp_path):
    """The first layer reads the same bits in BF16 and in `te`, and all weights are the same."""
    found = {}
    for preset, (ranks, parallel) in (("te", LAYOUTS["one"]), ("bf16", LAYOUTS[layout])):
        logging = {"dir": str(tmp_path / preset), "fp8_stats_interval": 1}
        sections = {"parallel": parallel, "precision": {"preset": preset}}
        sections["logging"] = logging | {"fp8_stats_what_if": preset == "bf16"}
        sections["train"] = {"train_iters": 1, "micro_batch_size": 1, "eval_iters": 0}
        sections["scheduler"] = {"lr_warmup_iters": 0}
        run_distributed(train, ranks, tiny_config(sections))
        found[preset] = statistics_of(tmp_path / preset)
    rows = [
        (layer, kind)
        for layer, kind in found["te"]
        if kind in ("input", "weight", "grad_output") and layer.startswith("decoder")
    ]
    same = [row for row in rows if row[1] == "weight"]
    same.append(("decoder.layers.0.self_attention.linear_qkv", "input"))
    for row in rows:
        expected = found["te"][row] if row in same else {"snr": found["te"][row]["snr"]}
        # Partial sums are rounded to BF16, which moves an SNR by less than a quarter.
        assert not differences(found["bf16"][row], expected, 1e-5 if row in same else 0.06), row
    assert len(rows) == 2 * 4 * 3


def scales_of_supposed_casts(config):
    """Scales that this rank would give tensors whose amax differs by rank, by layer and kind."""
    with trainer_of(config) as trainer:
        linears = observing.linears_of(trainer.run.chunks)
        x = torch.full((16, 16), 2.0 ** -dist.get_rank())
        return {
            (name.rpartition(".")[2], kind): quantizer(x).scale.item()
            for name, linear in linears.items()
            if ".0." in name
            for kind, quantizer in observing.fp8_quantizers(linear).items()
        }


def test_ranks_share_the_scales_that_fp8_would_have(tiny_config, run_distributed):
    """Of weights, of what is gathered before a column-parallel GEMM, and after a row-parallel."""
    config = tiny_config({"parallel": TP2, "precision": {"preset": "bf16"}})
    first, second = run_distributed(scales_of_supposed_casts, 2, config)
    own = {key for key, scale in first.items() if second[key] == 2 * scale}
    column = {(name, "grad_output") for name in ("linear_qkv", "linear_fc1")}
    assert own == column | {(name, "input") for name in ("linear_proj", "linear_fc2")}
    assert all(second[key] == scale for key, scale in first.items() if key not in own)
