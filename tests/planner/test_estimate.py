"""Estimates: bytes that ranks send and hold, against those of processes; what fits; time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from fp8lm.config import load_config
from fp8lm.planner.estimate import estimate
from fp8lm.planner.layout import plan_layout
from fp8lm.planner.tracing.model import trace_model
from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.training.memory import state_bytes
from tests.launch.conftest import ROOT
from tests.planner.tiny import INTERLEAVED, NUM_IDS, PP2, TP2, tiny
from tests.training.runs import LLAMA, trainer_of

pytestmark = pytest.mark.slow

NODE = 2  # processes on a machine


@pytest.fixture(scope="module")
def h100():
    return Hardware.read(ROOT / "configs/hardware/h100.yaml")


@pytest.fixture(scope="module")
def estimated(h100):
    def of(config, world_size):
        return estimate(plan_layout(config, NUM_IDS, world_size, NODE), NUM_IDS, h100)

    return of


def measured(config):
    """What this rank has sent in the last step, what it holds, and where it is."""
    with trainer_of(config) as trainer:
        trainer.train()
        run, groups = trainer.run, trainer.run.groups
        state = state_bytes(run.weights, run.optimizer.states, run.data_parallel.padding)
        return trainer.sent, state, groups.pipeline_parallel.rank(), dist.get_rank()


RUNS = [
    *((2, preset, parallel, {}) for preset in ("bf16", "te", "o3") for parallel in (TP2, PP2, {})),
    (2, "o3_long", {"use_distributed_optimizer": False}, {}),
    (2, "o3", {"tensor_model_parallel_size": 2}, {}),
    (2, "o2", PP2 | INTERLEAVED, {"model": LLAMA}),
    (4, "o3_long", {"partition": "even", "node_size": 2}, {}),
    (4, "o3", TP2 | PP2, {"train": {"recompute_granularity": "full"}}),
    (4, "o3", {"node_size": 2}, {"precision": {"wire": {"params": "bf16", "grads": "bf16"}}}),
]


@pytest.mark.parametrize(("world_size", "preset", "parallel", "others"), RUNS)
def test_bytes_of_a_step_are_those_that_ranks_count(
    run_distributed, estimated, world_size, preset, parallel, others
):
    """Within 2 %: of the wires, what is left out are some scales and 16 bytes here and there."""
    precision = {"preset": preset} | others.get("precision", {})
    sections = others | {"parallel": parallel, "precision": precision}
    config = tiny(**sections)
    planned = estimated(config, world_size)
    results = run_distributed(measured, world_size, config)
    for (sent, state, stage, rank), place in zip(results, planned.layout.ranks, strict=True):
        assert (stage, rank) == (place.stage, place.rank)
        expected = planned.sent_by(place)
        assert expected.keys() == sent.keys()
        for wire, size in sent.items():
            assert expected[wire] == pytest.approx(size, rel=0.02), (wire, rank)
        held = planned.memory_of(place).components
        assert held["weights"] + held["grads"] == state["weights"] + state["grads"]
        assert held["optimizer"] == state["master"] + state["exp_avg"] + state["exp_avg_sq"]


E_7B = 2 * 2048 * 4096  # elements of the hidden states of a micro-batch of 2


@pytest.fixture(scope="module")
def layer_7b(h100):
    def saved(preset, *overrides):
        config = load_config(
            ROOT / "configs/gpt_7b.yaml", [f"precision.preset={preset}", *overrides]
        )
        return trace_model(config, 50257, h100, "hopper").layer.memory

    return saved


def test_what_a_layer_saves_by_hand(layer_7b):
    """In bytes per element of hidden states, statistics of norms and attention (under 1 %) apart.

    Residual stream twice 4, inputs of two norms' GEMMs 4, q, k and v together 6, q and k turned by
    RoPE 4, the output of attention 2, of the first MLP matrix 8, of GELU 8: 36. In FP8 the inputs
    of the four GEMMs take 1 + 1 + 1 + 4, and those of the projection are the output of attention.
    """
    assert sum(layer_7b("bf16").saved.values()) == pytest.approx(36 * E_7B, rel=0.01)
    for preset in ("te", "o3"):  # the FP8 copies of weights are the step's, not a micro-batch's
        saved = sum(layer_7b(preset).saved.values())
        assert saved == pytest.approx((36 - 4 - 8 + 1 + 1 + 1 + 4) * E_7B, rel=0.01)
    full = layer_7b("bf16", "train.recompute_granularity=full")
    assert sum(full.saved.values()) == pytest.approx(2 * E_7B, rel=0.01)


def test_what_one_layer_more_holds_is_what_it_saves(layer_7b):
    """The rest of the peak is one layer's or the head's, whatever their number."""
    layer = layer_7b("bf16")
    assert layer.peak == layer.peak_in_layers == pytest.approx(sum(layer.saved.values()))


def test_largest_micro_batch(estimated, h100):
    """On the line through one and two micro-batches, to the last that has room."""
    planned = estimated(tiny(train={"micro_batch_size": 1}), 2)
    assert planned.largest_micro_batch == 8  # of a batch of 16 on two replicas
    room = planned.fullest.total / 1e9
    exact = h100.model_copy(update={"memory_gb": room})
    assert replace(planned, hardware=exact).largest_micro_batch == 1
    small = h100.model_copy(update={"memory_gb": room / 2})
    assert replace(planned, hardware=small).largest_micro_batch == 0


def test_a_pipeline_holds_micro_batches_by_stage(estimated):
    """1F1B: p - s of the layers' activations; logits where the head is."""
    model = {"ffn_hidden_size": 128}  # logits are told by their width, the vocabulary's 256
    four = estimated(tiny(model=model, parallel={"pipeline_model_parallel_size": 4}), 4)
    activations = [stage[0].components["activations"] for stage in four.memory]
    assert activations[1] == pytest.approx(3 / 2 * activations[2])
    logits = [bool(stage[0].components["logits"]) for stage in four.memory]
    assert logits == [False, False, False, True]


def test_time_has_the_parts_that_a_layout_has(estimated):
    alone = estimated(tiny(), 1)
    assert alone.time.tensor_parallel == alone.time.pipeline == alone.time.data_parallel == 0
    assert alone.time.bubble == 0 and 0 < alone.mfu < 1
    pipeline = estimated(tiny(parallel=PP2), 2)
    share = pipeline.time.bubble / (pipeline.time.total - pipeline.time.optimizer)
    assert share == pytest.approx(pipeline.batches.bubble, rel=0.01)
    assert estimated(tiny(parallel=TP2), 2).time.tensor_parallel > 0
    assert estimated(tiny(), 2).time.data_parallel > 0
