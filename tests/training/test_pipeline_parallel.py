"""Pipelines: the curve of one process in every layout and schedule, bytes, faults, checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8lm.gradient.hierarchical import HierarchicalReduceScatter
from fp8lm.training.state import model_tensors, optimizer_tensors
from tests.training.runs import (
    APART,
    LLAMA,
    TOGETHER,
    curve,
    read,
    train,
    train_with_infinite_loss,
    trainer_of,
)

pytestmark = pytest.mark.slow

MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 2}
BATCH = {"micro_batch_size": 1, "global_batch_size": 4, "eval_iters": 1}
CURVE = {"train": {"train_iters": 5}}
FP32 = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32", "wire": {"grads": "fp32"}}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def pp(stages, **keys):
    return {"pipeline_model_parallel_size": stages, **keys}


VIRTUAL = {"num_layers_per_virtual_pipeline_stage": 1}
UNEVEN = {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3}
ZB = {"pipeline_schedule": "zb-h1"}
LAYOUTS = {
    "pp2": (2, pp(2)),
    "pp4": (4, pp(4)),
    "pp2 uneven": (2, pp(2) | UNEVEN),
    "pp2 interleaved": (2, pp(2) | VIRTUAL),
    "pp4 zb-h1": (4, pp(4) | ZB),
    "pp2 dp2": (4, pp(2)),
    "pp2 dp2 zb-h1": (4, pp(2) | ZB),
    "pp2 tp2": (4, pp(2) | TP2),
    "pp2 tp2 zb-h1": (4, pp(2) | TP2 | ZB),
}
ALL = {
    "tp2 pp2 dp2": (8, pp(2) | TP2 | {"partition": "even"}),
    "tp2 pp2 dp2 interleaved": (8, pp(2) | TP2 | VIRTUAL | {"overlap_param_gather": True}),
}


@pytest.fixture
def config(tiny_config):
    def make(parallel, *changes, model=None, precision=None):
        sections = {"train": BATCH, "parallel": parallel, "precision": precision or {}}
        return tiny_config(sections | {"model": MODEL | (model or {})}, *changes)

    return make


def losses(folder):
    lines = read(folder)
    return torch.tensor(
        [line[key] for key in ("lm loss", "lm loss validation") for line in lines if key in line]
    )


# Exact in fp32: only the tied table's gradient and the norm are summed in another order. In o3
# each stage casts what it receives once more, E4M3's 2^-4 with a scale per token.
PRECISIONS = {"fp32": (FP32, 2e-5), "o3": ({"preset": "o3"}, 0.03)}


@pytest.fixture(scope="module")
def curve_of(run_distributed, tmp_path_factory):
    """Losses of a run; those of one process are made once."""
    made = {}

    def run(config, ranks, parallel, tied, precision):
        key = (tied, precision) if ranks == 1 else None
        if key not in made or ranks > 1:
            folder = tmp_path_factory.mktemp("curve")
            logging = {"logging": {"dir": str(folder), "log_interval": 1}}
            model = {"hidden_dropout": 0.1} if tied else LLAMA
            keys = PRECISIONS[precision][0]
            changed = config(parallel, logging, CURVE, model=model, precision=keys)
            run_distributed(train, ranks, changed)
            made[key] = losses(folder)
        return made[key]

    return run


@pytest.mark.parametrize("layout", LAYOUTS | ALL)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_curve_of_one_process(layout, tied, config, curve_of):
    ranks, parallel = (LAYOUTS | ALL)[layout]
    for precision, (_, bound) in PRECISIONS.items():
        one = curve_of(config, 1, {}, tied, precision)
        several = curve_of(config, ranks, parallel, tied, precision)
        assert one[4] < 0.9 * one[0]
        assert ((several - one).abs() / one).max() < bound, precision


OTHER_SHAPES = {
    "qwen": LLAMA | {"num_query_groups": 1, "add_qkv_bias": True, "qk_layernorm": True},
    "neox": {"use_parallel_residual": True, "gelu_approximate": "none", "rotary_percent": 0.5},
}


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_curve_of_other_shapes(shape, config, run_distributed, tmp_path):
    curves = []
    for ranks, parallel in ((1, {}), (4, pp(2) | TP2)):
        logging = {"logging": {"dir": str(tmp_path / str(ranks)), "log_interval": 1}}
        model = OTHER_SHAPES[shape]
        changed = config(parallel, logging, CURVE, model=model, precision=FP32)
        run_distributed(train, ranks, changed)
        curves.append(losses(tmp_path / str(ranks)))
    one, several = curves
    assert one[4] < 0.9 * one[0]
    assert ((several - one).abs() / one).max() < PRECISIONS["fp32"][1]


@pytest.mark.parametrize(
    "layouts", [["pp2 interleaved", "pp2 tp2 zb-h1"], ["pp2 dp2"]], ids=["learned", "rope"]
)
def test_curve_of_documents_apart(layouts, config, run_distributed, tmp_path):
    """Validation as well; every stage reads the bounds of documents from its own data."""
    learned = {"position_embedding_type": "learned_absolute"}
    model = learned if len(layouts) > 1 else LLAMA

    def losses_of(name, ranks, parallel, data=APART):
        logging = {"logging": {"dir": str(tmp_path / name), "log_interval": 1}}
        changed = config(parallel, logging, CURVE, data, model=model, precision=FP32)
        run_distributed(train, ranks, changed)
        return losses(tmp_path / name)

    one = losses_of("one", 1, {})
    assert one[4] < 0.9 * one[0]
    together = losses_of("together", 1, {}, TOGETHER)
    assert ((one - together).abs() / one).max() > 1e-3
    for layout in layouts:
        several = losses_of(layout, *LAYOUTS[layout])
        assert ((several - one).abs() / one).max() < PRECISIONS["fp32"][1], layout


@pytest.mark.parametrize("layout", ["pp4", "pp2 interleaved", "pp4 zb-h1"])
def test_micro_batches_in_flight(layout, config, run_distributed):
    ranks, parallel = LAYOUTS[layout]
    batch = {"train": {"global_batch_size": 16, "train_iters": 3}}
    results = run_distributed(in_flight, ranks, config(parallel, batch))
    _, _, promised = results[0]
    assert [most for most, _, _ in results] == list(promised)
    # Sent messages are let go of while the step goes on: 16 of each chunk were sent per step, in
    # either direction, in each of which one more is held until the oldest has been waited for.
    assert all(0 < messages <= 2 * (max(promised) + 1) for _, messages, _ in results)


def in_flight(config):
    """Most micro-batches and sent messages that this rank held, and what the schedule promises."""
    with trainer_of(config) as trainer:
        pipeline = trainer.run.pipeline
        held, most, send = 0, 0, pipeline.wire.send

        def let_go(_):
            nonlocal held
            held -= 1

        def count(*args):
            nonlocal held, most
            handle = send(*args).then(let_go)
            held += 1
            most = max(most, held)
            return handle

        pipeline.wire.send = count
        trainer.train()
    return pipeline.most_in_flight, most, pipeline.schedule(16).in_flight


def test_bytes_between_stages(config, run_distributed, tmp_path):
    hidden, tokens = 128, 16
    sent = {}
    for wire in ("fp8", "bf16"):
        folder = tmp_path / wire
        logging = {"logging": {"dir": str(folder), "log_interval": 1}}
        precision = {"wire": {"pipeline": wire}}
        model = LLAMA | {"hidden_size": hidden, "ffn_hidden_size": 128}
        run_distributed(train, 2, config(pp(2), logging, model=model, precision=precision))
        sent[wire] = read(folder)[1]["comm_bytes/pipeline"]
    # The first stage sends activations of four micro-batches: values, and a scale per token.
    assert sent["bf16"] == 4 * tokens * hidden * 2
    assert sent["fp8"] == 4 * tokens * (hidden + 4)
    assert sent["fp8"] <= 0.52 * sent["bf16"]


def state(config):
    with trainer_of(config) as trainer:
        trainer.train()
        trainer.run.optimizer.share_amax()
        trainer.run.data_parallel.finish_param_sync()
    run = trainer.run
    return model_tensors(run.weights) | optimizer_tensors(run.optimizer)


def test_the_ends_keep_one_table(config, run_distributed):
    results = run_distributed(state, 4, config(pp(4)))
    table = "embedding.word_embeddings.weight"
    names = [key for key in results[0] if key.param == table]
    assert len(names) >= 6
    assert set(names) <= set(results[-1])
    for name in names:
        assert torch.equal(results[0][name], results[-1][name]), name
    assert not any(key.param == table for key in results[1])


@pytest.mark.parametrize("layout", ["pp2 interleaved", *ALL])
def test_resumed_equals_uninterrupted(layout, config, run_distributed, folders, tmp_path):
    ranks, parallel = (LAYOUTS | ALL)[layout]
    dropout = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}

    def of(run, **keys):
        short = {"train_iters": 4, "eval_interval": 2}
        return config(parallel, folders(run), dropout, {"train": short | keys})

    whole = run_distributed(state, ranks, of("whole"), timeout=120)
    run_distributed(train, ranks, of("parts", exit_interval=2), timeout=120)
    parts = run_distributed(state, ranks, of("parts"), timeout=120)
    for first, second in zip(whole, parts, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


REDUCTIONS = {
    "tp2 pp2 dp2 fp8_sum": (
        pp(2) | TP2 | {"partition": "even", "overlap_param_gather": True, "ddp_bucket_size": 5000},
        {"grad_reduce": "fp8_sum"},
    ),
    "pp2 dp4 two hops": (pp(2) | {"node_size": 2}, {}),
}


def followed(config):
    """Stage of this rank, its weights' shards, the weights, and every mu after each step."""
    with trainer_of(config) as trainer:
        run, history = trainer.run, []
        reduction = run.data_parallel.buckets.reductions["dense"].reduction
        in_two_hops = isinstance(reduction, HierarchicalReduceScatter)
        assert in_two_hops == (config.parallel.node_size is not None)
        finish = run.data_parallel.start_param_sync

        def start_param_sync(skipped):
            finish(skipped)
            history.append({n: mu.item() for n, mu in run.data_parallel.named_tensors().items()})

        run.data_parallel.start_param_sync = start_param_sync
        trainer.train()
        run.data_parallel.finish_param_sync()
    place = run.groups.pipeline_parallel.rank(), run.groups.tensor_parallel.rank()
    return *place, model_tensors(run.weights), history


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_reductions(reduction, config, run_distributed, tmp_path):
    """Replicas agree on weights, all ranks of a stage on mu; the curve is that of one process."""
    one, several = (
        {
            "train": {"global_batch_size": 8},
            "logging": {"dir": str(tmp_path / name), "log_interval": 1},
        }
        for name in ("one", "several")
    )
    parallel, precision = REDUCTIONS[reduction]
    run_distributed(train, 1, config({}, one))
    results = run_distributed(
        followed, 8, config(parallel, several, precision=precision), timeout=120
    )
    same_shard, same_stage = {}, {}
    for stage, shard, weights, mu in results:
        for name, tensor in same_shard.setdefault((stage, shard), weights).items():
            assert torch.equal(weights[name], tensor), name
        assert mu == same_stage.setdefault(stage, mu)
    one, found = losses(tmp_path / "one"), losses(tmp_path / "several")
    assert ((found - one).abs() / one).max() < 0.05
    if "fp8_sum" in reduction:
        check_reports_of_mu(list(same_stage.values()), read(tmp_path / "several"))


def check_reports_of_mu(stages, lines):
    """Every report has the smallest and the largest of all stages."""
    reports = [line for line in lines if "fp8/mu/max" in line]
    every = [[mu for stage in step for mu in stage.values()] for step in zip(*stages, strict=True)]
    assert any(len(set(mus)) > 1 for mus in every)
    assert [r["fp8/mu/max"] for r in reports] == [max(mus) for mus in every]
    assert [r["fp8/mu/min"] for r in reports] == [min(mus) for mus in every]


def poisoned(config, bad_stage):
    """Whether a NaN in one stage's gradients skips the step on all, and changes nothing."""
    with trainer_of(config) as trainer:
        run = trainer.run
        trainer.train()
        run.optimizer.share_amax()
        tensors = lambda: model_tensors(run.weights) | optimizer_tensors(run.optimizer)  # noqa: E731
        before = {name: tensor.clone() for name, tensor in tensors().items()}
        for weight in run.weights.values():
            weight.main_grad.zero()
            weight.main_grad.zero_if_unused()
        if run.pipeline.stage == bad_stage:
            weight.main_grad.value.payload.view(-1)[0] = float("nan")  # the last weight's, dense
        gradients = run.data_parallel.reduce()
        skip = run.optimizer.step(1e-2, gradients, loss=torch.ones(())).skip
        run.data_parallel.start_param_sync(skip)
        run.optimizer.share_amax()
        same = all(torch.equal(before[name], tensor) for name, tensor in tensors().items())
    return bool(skip), same


def test_a_stage_that_raises_ends_the_job_with_its_own_error(tmp_path):
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*launch, str(root / "tests/training/failing_stage.py")]
    command += [str(root / "configs/gpt_tiny.yaml"), "parallel.pipeline_model_parallel_size=2"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode not in (0, 2)
    assert "ArithmeticError: stage 1 broke" in done.stderr


@pytest.mark.parametrize("bad_stage", [0, 1])
def test_a_fault_on_one_stage_stops_the_step_everywhere(bad_stage, config, run_distributed):
    model = LLAMA if bad_stage else {"position_embedding_type": "rope"}
    results = run_distributed(poisoned, 2, config(pp(2), model=model), bad_stage)
    assert results == [(True, True)] * 2


def test_a_loss_that_is_not_finite_stops_the_step_on_every_stage(config, run_distributed):
    results = run_distributed(train_with_infinite_loss, 4, config(pp(2)), 3)  # of one replica
    assert results == [(8, True)] * 4
