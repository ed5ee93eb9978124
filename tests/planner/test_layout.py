"""Planned layouts: what is predicted is what processes hold, byte for byte."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from fp8lm.config import load_config
from fp8lm.planner.layout import STATES, plan_layout
from fp8lm.runtime.errors import InputError
from fp8lm.training.memory import state_bytes
from tests.launch.conftest import ROOT
from tests.planner.tiny import INTERLEAVED, NUM_IDS, PP2, TP2, UNEVEN, tiny
from tests.training.runs import LLAMA, trainer_of

POSITIONS = {"position_embedding_type": "learned_absolute"}

RUNS = [
    (1, {}),
    (1, {"precision": {"preset": "o1"}}),
    (4, {}),
    (4, {"parallel": {"partition": "even"}}),
    (4, {"parallel": {"use_distributed_optimizer": False}, "precision": {"preset": "o2"}}),
    (4, {"parallel": {"overlap_param_gather": True, "ddp_bucket_size": 20000}, "model": POSITIONS}),
    (
        4,
        {"parallel": {"overlap_param_gather": True, "ddp_bucket_size": 20000, "partition": "even"}},
    ),
    (2, {"parallel": PP2 | INTERLEAVED, "model": LLAMA}),
    (2, {"parallel": PP2 | UNEVEN, "precision": {"preset": "te"}}),
    (8, {"parallel": TP2 | PP2}),
    (8, {"parallel": TP2 | PP2 | {"partition": "even"}, "precision": {"preset": "o2"}}),
    (8, {"parallel": TP2 | PP2 | INTERLEAVED, "model": LLAMA, "precision": {"preset": "bf16"}}),
    (4, {"parallel": TP2 | PP2, "train": {"objective": "dpo"}}),
    (1, {"train": {"objective": "dpo"}, "precision": {"preset": "o1"}}),
    (4, {"parallel": TP2, "precision": {"first_last_layers_bf16": True}, "model": POSITIONS}),
]


def held(config):
    """What the job's processes count in their buffers, and where they are in its groups."""
    with trainer_of(config) as trainer:
        run, groups = trainer.run, trainer.run.groups
        place = (
            groups.tensor_parallel.rank(),
            groups.data_parallel.rank(),
            groups.pipeline_parallel.rank(),
        )
        state = state_bytes(run.weights, run.optimizer.states, run.data_parallel.padding)
        state["reference"] = 0 if run.reference is None else run.reference.nbytes
        return state, place, sorted(run.weights), dist.get_rank()


@pytest.mark.parametrize(("world_size", "sections"), RUNS)
def test_what_is_predicted_is_what_processes_hold(run_distributed, world_size, sections):
    config = tiny(**sections)
    layout = plan_layout(config, NUM_IDS, world_size, node_size=2)
    results = run_distributed(held, world_size, config)
    for place, (state, numbers, names, rank) in zip(layout.ranks, results, strict=True):
        assert (place.rank, *numbers) == (rank, place.tensor, place.data, place.stage)
        assert (place.node, place.local_rank) == divmod(rank, 2)
        assert dict(layout.state(place)) == state
        assert sorted(layout.stages[place.stage].weights) == names
    assert layout.totals == [sum(state.values()) for state, *_ in results]


def test_bytes_of_preset_o3_by_hand():
    """One FP8 matrix of R x C: 1 + 4/RC bytes of weight and of gradient, 2 + 1 + 2 of states."""
    layout = plan_layout(tiny(), NUM_IDS, world_size=2, node_size=2)
    stage = layout.stages[0]
    matrices = [weight for weight in stage.weights.values() if weight.spec.format.scaled]
    others = [weight for weight in stage.weights.values() if not weight.spec.format.scaled]
    fp8, rest = (sum(w.spec.numel for w in ws) for ws in (matrices, others))
    assert stage.state[0]["weights"] == fp8 + 4 * len(matrices) + 2 * rest
    assert stage.state[0]["grads"] == fp8 + 4 * len(matrices) + 4 * rest
    owned = {kind: sum(replica[kind] for replica in stage.state) for kind in STATES}
    scales, everything = 4 * len(stage.weights), fp8 + rest
    assert owned == {
        "master": 2 * everything + scales,
        "exp_avg": everything + scales,
        "exp_avg_sq": 2 * everything + scales,
    }


@pytest.mark.parametrize(("preset", "copies"), [("bf16", 0), ("o3", 1), ("o2", 2), ("te", 2)])
def test_kept_operands_are_counted_as_on_a_gpu(preset, copies):
    """The FP8 copy of what is stored otherwise, and the transposed copy of what is FP8."""
    planned = {}
    for kept in (False, True):
        precision = {"preset": preset, "cache_weight_operands": kept}
        planned[kept] = plan_layout(tiny(precision=precision), NUM_IDS, 1, 1).stages[0]
    matrices = sum(
        weight.spec.numel
        for weight in planned[True].weights.values()
        if not weight.spec.keep_high_precision
    )
    assert planned[False].state[0]["operands"] == (preset in ("o2", "te")) * matrices
    assert planned[True].state[0]["operands"] == copies * matrices


EVEN, OVERLAP = "parallel.partition=even", "parallel.overlap_param_gather=true"


def planned(name, vocabulary, world_size, *keys):
    config = load_config(ROOT / f"configs/{name}.yaml", ["data.mock_data=true", *keys])
    return plan_layout(config, vocabulary, world_size, 8)


@pytest.mark.parametrize(
    ("name", "vocabulary", "world_size", "ratios"),
    [
        ("gpt_125m", 50304, 8, (2.499, 1.313, 1.041)),
        ("llama_1b", 128256, 64, (11.25, 1.353, 1.01)),
        ("llama_8b", 128256, 64, (2.093, 1.131, 1.052)),
    ],
)
def test_states_of_the_fullest_rank_over_the_mean(name, vocabulary, world_size, ratios):
    """The table of docs/concepts/parallelism.md."""
    found = [
        planned(name, vocabulary, world_size, *keys).imbalance
        for keys in (("parallel.partition=tensor",), (EVEN,), (EVEN, OVERLAP))
    ]
    assert found == pytest.approx(ratios, abs=5e-4)


@pytest.mark.parametrize(("bucket", "ratio"), [(40_000_000, 1.118), (400_000_000, 1.04)])
def test_row_blocks_of_every_bucket_are_padded(bucket, ratio):
    keys = (EVEN, OVERLAP, f"parallel.ddp_bucket_size={bucket}")
    stage = planned("gpt_7b", 50304, 1024, *keys).stages[0]
    weights = sum(weight.model_param.nbytes for weight in stage.weights.values())
    assert stage.state[0]["weights"] / weights == pytest.approx(ratio, abs=5e-4)


def test_parameters_count_once():
    """A table that first and last stage hold is one; so is a matrix that two ranks hold."""
    whole = plan_layout(tiny(), NUM_IDS, 1, 1)
    assert (
        whole.num_parameters == plan_layout(tiny(parallel=TP2 | PP2), NUM_IDS, 8, 8).num_parameters
    )
    table, layer = 256 * 64, 4 * 64 + 64 * 3 * 64 + 3 * 64 + 64 * 64 + 64 + 2 * 4 * 64 * 64 + 5 * 64
    assert whole.num_parameters == table + 4 * layer + 2 * 64


def test_processes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="6 processes cannot be divided"):
        plan_layout(tiny(parallel=TP2 | PP2), NUM_IDS, 6, 2)
