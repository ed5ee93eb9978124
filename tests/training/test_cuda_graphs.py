"""Micro-batches replayed as a CUDA graph would: the losses, bytes sent and state of eager steps."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.model.objectives import LanguageModeling
from fp8lm.parallel.cuda_graphs import check_nccl
from fp8lm.runtime.errors import InputError
from fp8lm.telemetry.observing import linears_of
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer
from fp8lm.training.state import model_tensors, optimizer_tensors
from fp8lm.training.trainer import STEP, TrainerHook
from tests.training.literal_replay import LiteralReplay
from tests.training.runs import BeforeStep

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GRAPHS = {"train": {"enable_cuda_graph": True, "cuda_graph_warmup_steps": 1}}
# 1, 1, 2, 2, 3, 3, 3 micro-batches: the first graph is captured in step 2, the other in step 4.
RAMP = {
    "train": {
        "global_batch_size": 6,
        "rampup_batch_size": [2, 2, 8],
        "train_samples": 30,
        "train_iters": None,
        "eval_interval": 5,
    },
    "scheduler": {"lr_warmup_iters": 0, "lr_warmup_samples": 4},
    "model": {"hidden_dropout": 0.1},
}
LAYER = {"model": {"num_layers": 1, "hidden_size": 64}}
STATISTICS = {"logging": {"fp8_stats_interval": 6}}
TWO = {"train": {"global_batch_size": 8, "train_iters": 4, "eval_iters": 0}}


class Results(TrainerHook):
    """Losses, norms and bytes sent in every step."""

    def __init__(self):
        self.steps = []

    def after_step(self, trainer, result):
        numbers = (result.loss, result.grad_norm, result.share)
        self.steps.append(([x.item() for x in numbers], trainer.sent))


def train(config, capture=None, act=None, *, hooks=(), device=CPU):
    """Train on all ranks; what every step has given, and all state at the end."""
    dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
    results = Results()
    hooks = [results, *hooks] if act is None else [results, BeforeStep(act), *hooks]
    with model_parallel_groups(dims) as groups:
        trainer = build_trainer(build(config, groups, device, capture), hooks=hooks)
        trainer.load()
        trainer.train()
    run = trainer.run
    tensors = model_tensors(run.weights) | optimizer_tensors(run.optimizer)
    return results.steps, {name: tensor.clone() for name, tensor in tensors.items()}


def both(make, *changes, act=None):
    """The same run with and without graphs; the captures of the former."""
    capture = LiteralReplay()
    replayed = train(make(*changes, GRAPHS), capture, act)
    assert_equal(replayed, train(make(*changes), act=act))
    return capture


def assert_equal(replayed, eager):
    assert replayed[0] == eager[0]
    assert all(torch.equal(replayed[1][name], eager[1][name]) for name in eager[1])


@pytest.fixture
def one_process(capsys):
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("preset", ["bf16", "te_delayed", "o3", "o3_long", "o4"])
def test_replays_are_eager_steps(preset, tiny_config, one_process):
    """Through a ramp-up, an evaluation, and a step whose casts are observed."""
    capture = both(tiny_config, RAMP, LAYER, STATISTICS, {"precision": {"preset": preset}})
    assert (len(capture.captures), capture.replays) == (2, 8)


@pytest.mark.parametrize(
    "keys",
    [
        {"precision": {"preset": "te", "cache_weight_operands": True}},
        {"train": {"recompute_granularity": "full", "calculate_per_token_loss": False}},
    ],
    ids=["kept operands", "recomputed"],
)
def test_what_is_kept_or_computed_twice(keys, tiny_config, one_process):
    assert len(both(tiny_config, TWO, LAYER, keys).captures) == 2


def fall_back_in_step_3(trainer):
    (linear, *_) = linears_of(trainer.run.chunks).values()
    if trainer.progress.iteration == 2:
        linear.fall_back()
    if trainer.progress.iteration == 4:
        linear.restore()


def numbers(capture):
    return [operation.numbers() for operation in capture.operations]


def test_other_formats_are_captured_anew_and_captures_differ_in_nothing_else(
    tiny_config, one_process
):
    """The first captures of a run and its last: what changes in between is in tensors."""
    changes = {"train": {"global_batch_size": 8, "train_iters": 6, "eval_iters": 0}}
    capture = both(tiny_config, changes, LAYER, act=fall_back_in_step_3)
    first, further, *fallen, first_again, further_again = capture.captures
    assert len(fallen) == 2 and numbers(fallen[0]) != numbers(first)
    for before, after in ((first, first_again), (further, further_again)):
        assert numbers(before) == numbers(after)
        assert len(before.reads) == len(after.reads)
    # Those replayed together share memory; a pool whose captures are gone is not used again.
    assert [capture.pools.index(pool) for pool in capture.pools] == [0, 0, 2, 2, 4, 4]


class Counting(LanguageModeling):
    """A loss with a number of the host in it, another one for every micro-batch."""

    count = itertools.count(1)

    def loss(self, output, batch):
        return super().loss(output, batch) * next(self.count)


class Reading(LanguageModeling):
    """A loss that the host reads."""

    def loss(self, output, batch):
        loss = super().loss(output, batch)
        return loss if loss.item() < 10 else loss * 0


def with_objective(kind):
    def act(trainer):
        objective = trainer.run.objective
        if not isinstance(objective, kind):
            Counting.count = itertools.count(1)
            object.__setattr__(trainer.run, "objective", kind(objective.num_ids, objective.tp))

    return act


def test_a_number_of_the_host_would_show(tiny_config, one_process):
    """One that changes from micro-batch to micro-batch, which replays do not follow."""
    long = {"train": {"cuda_graph_warmup_steps": 9}}
    eager, warming_up, replayed = (
        train(config, LiteralReplay(), with_objective(Counting))
        for config in (
            tiny_config(TWO, LAYER),
            tiny_config(TWO, LAYER, GRAPHS, long),
            tiny_config(TWO, LAYER, GRAPHS),
        )
    )
    assert_equal(warming_up, eager)
    assert replayed[0] != eager[0]


def test_what_cannot_be_captured_names_the_key(tiny_config, one_process):
    with pytest.raises(InputError, match=r"train\.enable_cuda_graph.*capturing.*=false"):
        train(tiny_config(TWO, LAYER, GRAPHS), LiteralReplay(), with_objective(Reading))


def train_both_on_ranks(eager, graphs):
    capture = LiteralReplay()
    assert_equal(train(graphs, capture), train(eager))
    return len(capture.captures), capture.replays


LAYOUTS = {
    "tp2 sp": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, (2, 12)),
    "tp2": ({"tensor_model_parallel_size": 2}, (2, 12)),
    "dp2, reduced in backward": ({}, (1, 3)),  # of two micro-batches the first
    "dp2": ({"overlap_grad_reduce": False}, (2, 6)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_two_ranks(layout, tiny_config, run_distributed):
    parallel, expected = LAYOUTS[layout]
    configs = (
        tiny_config(TWO, LAYER, {"parallel": parallel}, *changes) for changes in ((), (GRAPHS,))
    )
    assert run_distributed(train_both_on_ranks, 2, *configs) == [expected] * 2


def test_a_step_of_one_micro_batch_with_its_reduction(tiny_config, run_distributed):
    config = tiny_config(TWO, LAYER, GRAPHS, {"train": {"global_batch_size": 4}})
    with pytest.raises(InputError, match="overlap_grad_reduce=false"):
        run_distributed(train, 2, config)


@pytest.mark.parametrize("keys", [{"tp": 1}, {"tp": 2}])
def test_ranks_whose_exchanges_are_not_captured(keys, one_process):
    """A group of one rank stands for the two: its backend is gloo."""
    with model_parallel_groups(ParallelDims()) as groups:
        groups = replace(groups, dims=ParallelDims(**keys))
        if keys["tp"] == 1:
            check_nccl(groups, {})
        else:
            with pytest.raises(InputError, match=r"enable_cuda_graph.*NCCL.*gloo"):
                check_nccl(groups, {})


class SyncDebug(TrainerHook):
    """From step `first` on, what waits for the device in a step is an error."""

    def __init__(self, first):
        self.first = first

    @contextmanager
    def phase(self, trainer, name):
        checks = name == STEP and trainer.progress.iteration + 1 >= self.first
        torch.cuda.set_sync_debug_mode("error" if checks else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["bf16", "te_delayed", "o3", "o3_long", "o4"])
def test_graphs_of_a_gpu_are_eager_steps_and_wait_for_nothing(preset, tiny_config, one_process):
    """The runs of `test_replays_are_eager_steps`; samples are one block of keys."""
    changes = (RAMP, LAYER, STATISTICS, {"precision": {"preset": preset}})
    device = torch.device("cuda", 0)
    eager = train(tiny_config(*changes), device=device)
    hooks = [SyncDebug(first=7)]  # both kinds are replayed then
    assert_equal(train(tiny_config(*changes, GRAPHS), hooks=hooks, device=device), eager)
