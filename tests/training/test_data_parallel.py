"""Replicas of a model: the curve of one process, states divided, bytes, faults, checkpoints."""

from __future__ import annotations

import gc
import itertools
import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import differences
from fp8lm.comm import all_gather_uneven
from fp8lm.comm.accounting import all_reduce_sent
from fp8lm.gradient.hierarchical import HierarchicalReduceScatter
from fp8lm.optim.step_scalars import NUM_GATHERED
from fp8lm.parallel import param_buffer
from fp8lm.runtime.errors import InputError
from fp8lm.training.evaluation import run_batches
from fp8lm.training.memory import linear_weights, state_bytes
from fp8lm.training.state import model_tensors, optimizer_tensors
from tests.training.runs import (
    LLAMA,
    curve,
    read,
    train,
    train_with_infinite_loss,
    trainer_of,
)

pytestmark = pytest.mark.slow

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EVEN = {"partition": "even"}
OVERLAP = {"overlap_param_gather": True, "ddp_bucket_size": 20_000}
PLAIN = {"use_distributed_optimizer": False}
FP32 = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32", "wire": {"grads": "fp32"}}
BATCH = {"micro_batch_size": 1, "global_batch_size": 8, "eval_iters": 2}
# Where what is compared is there after one step, or after a few.
ONE_STEP = {
    "train": {"train_iters": 1, "eval_iters": 1},
    "scheduler": {"lr_warmup_iters": 0},
    "logging": {"log_interval": 1},
}
FEW_STEPS = {"train": {"train_iters": 4, "eval_iters": 1}}
LAYOUTS = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "dp4 even": (4, EVEN),
    "dp2 plain": (2, PLAIN),
    "dp2 tp2": (4, TP2),
    "dp2 tp2 even": (4, TP2 | EVEN),
}


@pytest.fixture
def config(tiny_config):
    def make(parallel, *changes, model=LLAMA, precision=None):
        return tiny_config(
            {"model": model, "train": BATCH, "parallel": parallel, "precision": precision or {}},
            *changes,
        )

    return make


def losses(folder):
    return torch.tensor([line["lm loss"] for line in curve(folder) if "lm loss" in line])


# With fp32 weights, gradients and wires only sums are taken in another order. In o3 every replica
# casts its own activations and gradients, with E4M3's 2^-4 at each.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("precision", "bound"), [(FP32, 2e-5), ({"preset": "o3"}, 0.03)])
def test_curve_of_one_process(layout, precision, bound, config, run_distributed, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    curves = []
    for count, keys in ((1, {}), (ranks, parallel)):
        folder = tmp_path / str(count)
        logging = {"logging": {"dir": str(folder), "log_interval": 1}}
        short = {"train": {"train_iters": 5}}
        run_distributed(train, count, config(keys, logging, short, precision=precision))
        curves.append(losses(folder))
        evaluations = [line for line in read(folder) if "lm loss validation" in line]
        curves[-1] = torch.cat(
            (curves[-1], torch.tensor([line["lm loss validation"] for line in evaluations]))
        )
    one, several = curves
    assert one[4] < 0.9 * one[0]
    assert ((several - one).abs() / one).max() < bound


def threads_after(config, runs):
    """Threads of this process after a number of runs: a group that is not freed keeps three."""
    for _ in range(runs):
        train(config)
    counts = []
    for _ in range(20):  # a thread that has been told to end takes its time
        gc.collect()
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.1)
    return min(counts)


@pytest.mark.parametrize(
    "layout", [TP2 | OVERLAP, TP2 | PLAIN, {"pipeline_model_parallel_size": 2}]
)
def test_a_run_that_is_over_is_freed(layout, config, run_distributed):
    few, many = (
        run_distributed(threads_after, 4, config(layout, ONE_STEP), runs) for runs in (1, 3)
    )
    assert all(after <= before for before, after in zip(few, many, strict=True))


def state(config):
    """This rank's tensors, and which rows of each weight its states are."""
    with trainer_of(config) as trainer:
        trainer.train()
        trainer.run.optimizer.share_amax()
        trainer.run.data_parallel.finish_param_sync()
    run = trainer.run
    return (
        model_tensors(run.weights),
        optimizer_tensors(run.optimizer),
        run.data_parallel.local_shards,
    )


def whole_state(results):
    """States of all ranks put together, by name."""
    whole = {}
    for _, tensors, owned in results:
        for name, tensor in tensors.items():
            if name.field != "payload":
                assert torch.equal(whole.setdefault(name, tensor), tensor), name
            else:
                whole.setdefault(name, {})[owned[name.param][0]] = tensor
    return {
        name: torch.cat([parts[row] for row in sorted(parts)]) if isinstance(parts, dict) else parts
        for name, parts in whole.items()
    }


def test_a_checkpoint_waits_for_weights_that_still_travel(
    config, run_distributed, folders, tmp_path
):
    """Cast where they arrive, they are not there before somebody has waited for them."""
    wire, saved = {"wire": {"params": "bf16"}}, []
    for overlap in (False, True):
        parallel = {"overlap_param_gather": overlap, "ddp_bucket_size": 1500}
        made = folders(f"overlap {overlap}")
        made["checkpoint"]["save_interval"] = 2
        run_distributed(train, 2, config(parallel, made, precision=wire))
        saved.append(open_checkpoint(made["checkpoint"]["save"], 2))
    assert list(differences(*saved)) == []


@pytest.mark.parametrize("preset", ["o3", "o2", "bf16"])
def test_division_of_states_changes_no_byte(preset, config, run_distributed):
    settings = [{}, EVEN, {"overlap_grad_reduce": False}, {"ddp_bucket_size": 2000}]
    settings.append(EVEN | {"ddp_bucket_size": 1})
    settings.append({"overlap_param_gather": True, "ddp_bucket_size": 1500})
    settings.append(EVEN | {"overlap_param_gather": True, "ddp_bucket_size": 1})
    check_same_bytes(
        [config(keys, FEW_STEPS, precision={"preset": preset}) for keys in settings],
        run_distributed,
    )


def check_same_bytes(configs, run_distributed):
    """Four replicas end with the same weights and states under all `configs`."""
    expected = None
    for changed in configs:
        results = run_distributed(state, 4, changed)
        weights = results[0][0]
        for others, _, _ in results[1:]:
            assert all(torch.equal(weights[name], others[name]) for name in weights)
        found = weights | whole_state(results)
        expected = expected or found
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (changed.parallel, name)


@pytest.mark.parametrize("reduction", [{"grad_reduce": "fp8_sum"}, {}], ids=["fp8_sum", "two hops"])
@pytest.mark.parametrize("partition", [{}, EVEN], ids=str)
def test_buckets_change_no_byte_where_the_owner_makes_a_difference(
    reduction, partition, config, run_distributed
):
    """The ring starts at the owner; in two hops what is summed on its machine is not cast."""
    nodes = {} if reduction else {"node_size": 2}
    settings = [{}, {"overlap_grad_reduce": False}, {"ddp_bucket_size": 1}]
    check_same_bytes(
        [config(partition | nodes | keys, FEW_STEPS, precision=reduction) for keys in settings],
        run_distributed,
    )


def test_plain_replicas_with_exact_wires_are_the_same_bytes(config, run_distributed):
    # The sums travel back in the wire's format: fp32 loses nothing.
    precision = {"preset": "bf16", "wire": {"grads": "fp32"}}
    divided, plain = (
        run_distributed(state, 2, config(parallel, precision=precision)) for parallel in ({}, PLAIN)
    )
    for name, tensor in whole_state(divided).items():
        assert torch.equal(plain[0][1][name], tensor), name
    for weights, states, _ in plain:
        assert all(torch.equal(tensor, divided[0][0][n]) for n, tensor in weights.items())
        assert all(torch.equal(tensor, plain[0][1][n]) for n, tensor in states.items())


def test_weights_on_a_two_byte_wire_are_the_same(config, run_distributed, folders, tmp_path):
    fp8, bf16 = (
        run_distributed(state, 2, config({}, folders(wire), precision={"wire": {"params": wire}}))
        for wire in ("fp8", "bf16")
    )
    sent = [read(tmp_path / wire)[1]["comm_bytes/params"] for wire in ("fp8", "bf16")]
    assert sent[1] > 1.5 * sent[0]  # tables, norms and biases have two bytes on either
    for (first, _, _), (second, _, _) in zip(fp8, bf16, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def held(config):
    """(bytes by kind, of all weights and of the linear layers' only) that this rank holds."""
    with trainer_of(config) as trainer:
        run = trainer.run
        states, padding = run.optimizer.states, run.data_parallel.padding
        linear = linear_weights(run.weights)
        return state_bytes(run.weights, states, padding), state_bytes(linear, states)


MODEL = {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128}
MATRICES = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 128 + 64 * 128)
DENSE = 2 * 128 * 64  # two tables; five norms are held by every rank of a TP group
NORMS = 5 * 64


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {}),
        (2, EVEN),
        (4, EVEN),
        (4, {}),
        (4, OVERLAP),
        (4, EVEN | OVERLAP),
        (4, TP2 | EVEN),
        (2, PLAIN),
    ],
)
def test_states_are_divided(ranks, parallel, config, run_distributed):
    results = run_distributed(held, ranks, config(parallel, {"model": MODEL}))
    tp = parallel.get("tensor_model_parallel_size", 1)
    copies = ranks // tp if parallel == PLAIN else 1
    everything, linear = (
        {kind: sum(result[i][kind] for result in results) for kind in results[0][0]}
        for i in range(2)
    )
    replicas = ranks // tp
    scales = 0.01  # what they may add
    weights = replicas * (MATRICES + 2 * DENSE + 2 * tp * NORMS)
    assert everything["weights"] == pytest.approx(weights, rel=0.03)  # row blocks pad the buffer
    assert linear["weights"] == pytest.approx(replicas * MATRICES, rel=scales)
    assert linear["grads"] == pytest.approx(replicas * MATRICES, rel=scales)
    for kind, size in (("master", 2), ("exp_avg", 1), ("exp_avg_sq", 2)):
        assert linear[kind] == pytest.approx(copies * size * MATRICES, rel=scales)
        parameters = MATRICES + DENSE + tp * NORMS
        assert everything[kind] == pytest.approx(copies * size * parameters, rel=scales)
    if copies == 1:  # 2 + 5/d bytes per parameter, in the mean over the ranks
        total = sum(linear.values()) / ranks
        assert total / (MATRICES / tp) == pytest.approx(2 + 5 / replicas, rel=scales)


def sent(config):
    """Bytes of gradients, without a step's scalars, and of weights that this rank sends in one."""
    with trainer_of(config) as trainer:
        trainer.train()
    ranks = trainer.run.groups.world.size()
    scalars = (ranks - 1) * 4 * NUM_GATHERED
    scalars += all_reduce_sent(ranks, 4 * 4 * len(trainer.run.weights))  # gradients and states
    return trainer.sent["grads"] - scalars, trainer.sent["params"]


WIDE = {"hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256}
SIZES = {"matrices": 2 * (4 * 128 * 128 + 3 * 128 * 256), "tables": 2 * 128 * 128, "norms": 5 * 128}


@pytest.mark.parametrize("division", [{}, OVERLAP, EVEN, EVEN | OVERLAP], ids=str)
@pytest.mark.parametrize(("ranks", "layers"), [(2, {}), (4, {}), (4, TP2)], ids=str)
def test_bytes_on_the_wires(ranks, layers, division, config, run_distributed):
    tp = layers.get("tensor_model_parallel_size", 1)
    replicas, matrices = ranks // tp, SIZES["matrices"] // tp
    dense = SIZES["tables"] // tp + SIZES["norms"]
    mean = {}
    for preset in ("o3", "bf16"):
        keys, of_preset = layers | division, {"preset": preset}
        changed = config(keys, {"model": WIDE}, ONE_STEP, precision=of_preset)
        mean[preset] = torch.tensor(run_distributed(sent, ranks, changed)).double().mean(dim=0)
    # In ring terms a rank sends (d-1)/d of what there is; 2 % are scales, alignment and, of row
    # blocks, padding.
    share = (replicas - 1) / replicas
    expected = {
        "o3": (matrices + 2 * dense, matrices + 2 * dense),
        "bf16": (4 * matrices + 4 * dense, 2 * matrices + 2 * dense),
    }
    for preset, (grads, params) in expected.items():
        assert share * grads <= mean[preset][0] <= 1.02 * share * grads
        assert share * params <= mean[preset][1] <= 1.02 * share * params
    # Of the matrices alone, 1 + 1 bytes against 4 + 2: at least 66 % below.
    fp8 = mean["o3"].sum() - share * 4 * dense
    assert 1 - fp8 / (mean["bf16"].sum() - share * 6 * dense) >= 0.66


def on_machines(config, *sizes):
    """Train as launched on machines of `sizes` processes: weights, replicas summed per machine."""
    machine, local = divided(dist.get_rank(), sizes)
    says = {
        "RANK": dist.get_rank(),
        "WORLD_SIZE": dist.get_world_size(),
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": sizes[machine],
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29400,
    }
    with mock.patch.dict(os.environ, {name: str(value) for name, value in says.items()}):
        with trainer_of(config) as trainer:
            trainer.train()
        run = trainer.run
        reduction = run.data_parallel.buckets.reductions["dense"].reduction
    per_node = reduction.node.size() if isinstance(reduction, HierarchicalReduceScatter) else None
    return model_tensors(run.weights), per_node


def divided(rank, sizes):
    """Machine of a rank, and number there."""
    for machine, size in enumerate(sizes):
        if rank < size:
            return machine, rank
        rank -= size
    raise ValueError(rank)


@pytest.mark.parametrize(
    ("sizes", "parallel", "per_node"),
    [
        ((2, 2), {}, 2),
        ((2, 1, 1), {}, None),
        ((2, 2, 2), {"pipeline_model_parallel_size": 2}, None),  # the second begins in the middle
    ],
    ids=str,
)
def test_machines_of_a_launcher(sizes, parallel, per_node, config, run_distributed):
    made = config(parallel, FEW_STEPS, {"train": {"global_batch_size": 12}})
    expected = run_distributed(train, sum(sizes), made)
    found = run_distributed(on_machines, sum(sizes), made, *sizes)
    assert [summed for _, summed in found] == [per_node] * sum(sizes)
    if per_node is None:  # as without machines
        for (tensors, _), (other, _) in zip(expected, found, strict=True):
            assert all(torch.equal(tensors[name], tensor) for name, tensor in other.items())


def poisoned(config, bad_rank, value):
    """Whether a step with `value` in one rank's gradients is skipped, and changes nothing."""
    with trainer_of(config) as trainer:
        run = trainer.run
        trainer.train()
        run.optimizer.share_amax()
        names = [n for n in run.weights if n not in run.data_parallel.local_shards and "qkv" in n]
        tensors = lambda: model_tensors(run.weights) | optimizer_tensors(run.optimizer)  # noqa: E731
        before = {name: tensor.clone() for name, tensor in tensors().items()}
        rank = run.groups.world.rank()
        for name, weight in run.weights.items():
            weight.main_grad.zero()
            gradient = torch.full(weight.spec.local_shape, 0.01)
            if rank == bad_rank and name in names[:1]:
                gradient.view(-1)[5] = value
            weight.main_grad.add(gradient)
        run.data_parallel.enable_grad_sync()
        gradients = run.data_parallel.reduce()
        skip = run.optimizer.step(1e-2, gradients, loss=torch.ones(())).skip
        run.data_parallel.start_param_sync(skip)
        run.optimizer.share_amax()
        same = all(torch.equal(before[name], tensor) for name, tensor in tensors().items())
    return len(names), bool(skip), same


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_fault_in_what_a_rank_does_not_own_stops_the_step_everywhere(
    value, config, run_distributed
):
    results = run_distributed(poisoned, 2, config({}), 0, value)
    assert results[0][0] > 0
    assert [result[1:] for result in results] == [(True, True)] * 2
    # Without the fault the same step happens.
    assert not any(skipped for _, skipped, _ in run_distributed(poisoned, 2, config({}), 5, value))


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_step_everywhere(bad_rank, config, run_distributed):
    """With gradients that are: nothing else tells."""
    results = run_distributed(train_with_infinite_loss, 2, config({}), bad_rank)
    assert results == [(8, True)] * 2


def arrivals(config):
    """What happened in the forward after a step: arrivals of weights, layers entered."""
    events = []
    with trainer_of(config) as trainer:
        run = trainer.run
        model, replicas = run.model, run.data_parallel
        for index, layer in model.decoder.layers.items():
            layer.register_forward_pre_hook(lambda *_, index=index: events.append(f"layer {index}"))
        trainer.train()
        replicas.finish_param_sync()
        parts = itertools.count()

        def gather(*args):
            part = next(parts)
            return all_gather_uneven(*args).then(lambda _: events.append(f"part {part}"))

        with mock.patch.object(param_buffer, "all_gather_uneven", gather):
            replicas.start_param_sync(torch.tensor(False))
        events.clear()
        batch = run_batches(run, run.datasets[0], 0).next(1)[0]
        model.forward_step(None, batch)
    return events, next(parts)


@pytest.mark.parametrize("size", [4000, 1], ids=["several in a part", "a weight in a part"])
def test_layers_start_before_later_weights_have_arrived(size, config, run_distributed):
    """All that a forward reads is waited for, norms that a linear layer applies too."""
    parallel = {"overlap_param_gather": True, "ddp_bucket_size": size}
    for events, parts in run_distributed(arrivals, 2, config(parallel, {"model": MODEL})):
        assert parts > 4
        found = {event for event in events if event.startswith("part")}
        assert len(found) == parts
        first, second = events.index("layer 0"), events.index("layer 1")
        assert [event for event in events[first:second] if event.startswith("part")]
        assert [event for event in events[second:] if event.startswith("part")]


@pytest.mark.parametrize("layout", ["dp4 even", "dp2 tp2 even", "dp2 plain"])
def test_resumed_equals_uninterrupted(layout, config, run_distributed, folders, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    dropout = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}

    def of(run, **keys):
        return config(parallel, folders(run), dropout, {"train": keys})

    whole = run_distributed(state, ranks, of("whole"))
    run_distributed(train, ranks, of("parts", exit_interval=4))
    parts = run_distributed(state, ranks, of("parts"))
    for (weights, states, _), (other_weights, other_states, _) in zip(whole, parts, strict=True):
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
        assert all(torch.equal(states[name], other_states[name]) for name in states)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


REDUCTIONS = [
    {"precision": {"grad_reduce": "fp8_sum"}},
    {"precision": {"grad_reduce": "fp8_pre_scaling"}},
    {"precision": {"grad_reduce": "fp8_post_scaling"}},
    {"parallel": {"node_size": 2}},
]


@pytest.mark.parametrize("changes", REDUCTIONS, ids=str)
@pytest.mark.parametrize("parallel", [EVEN, PLAIN], ids=str)
def test_other_reductions_train_alike_and_resume(
    changes, parallel, config, run_distributed, folders, tmp_path
):
    def of(run, **keys):
        return config(parallel, folders(run), changes, {"train": keys})

    run_distributed(train, 1, config({}, folders("one")))
    whole = run_distributed(state, 4, of("whole"))
    run_distributed(train, 4, of("parts", exit_interval=4))
    parts = run_distributed(state, 4, of("parts"))
    for (_, states, _), (_, other_states, _) in zip(whole, parts, strict=True):
        assert all(torch.equal(states[name], other_states[name]) for name in states)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    one, several = losses(tmp_path / "one"), losses(tmp_path / "whole")
    assert ((several - one).abs() / one).max() < 0.05
    reports = [line for line in read(tmp_path / "whole") if "fp8/mu/max" in line]
    assert bool(reports) == (changes.get("precision") == {"grad_reduce": "fp8_sum"})
    run_distributed(train, 1, config({}, folders("fewer", load="parts")))  # mu is passed over


def refused(config):
    with pytest.raises(InputError) as caught:
        train(config)
    return str(caught.value)


def test_batches_that_cannot_be_shared_are_refused(config, run_distributed):
    batch = {"train": {"micro_batch_size": 2, "global_batch_size": 6}}
    for message in run_distributed(refused, 2, config({}, batch)):
        assert (
            "train.global_batch_size = 6 is not divisible by train.micro_batch_size = 2 times"
            in (message)
        )
