"""Runs on two ranks: the curve of one process, resuming, loading under another size, bytes."""

from __future__ import annotations

import pytest
import torch

from fp8lm.config import load_config
from fp8lm.optim.step_scalars import NUM_GATHERED
from tests.training.runs import LLAMA, curve, read, train

pytestmark = pytest.mark.slow

PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SHAPES = {
    "gpt": {"position_embedding_type": "learned_absolute"},
    "llama": LLAMA,
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_resumed_equals_uninterrupted(shape, tiny_config, run_distributed, folders, tmp_path):
    def config(run, **keys):
        changes = {"model": SHAPES[shape], "parallel": PARALLEL, "train": keys}
        return tiny_config(folders(run), changes)

    whole = run_distributed(train, 2, config("whole"))
    run_distributed(train, 2, config("parts", exit_interval=4))
    parts = run_distributed(train, 2, config("parts"))
    for (expected, _), (state, _) in zip(whole, parts, strict=True):
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) > 8
    assert load_config(tmp_path / "whole" / "config.yaml", []) == config("whole")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (1, 2), (4, 2)])
def test_a_checkpoint_loads_under_another_size(
    shape, saved, loaded, tiny_config, run_distributed, folders
):
    def config(ranks, run, load=None, **keys):
        parallel = {"tensor_model_parallel_size": ranks}
        model = SHAPES[shape] | {"num_attention_heads": 4, "hidden_size": 64}
        train = {"train_iters": 2, "eval_iters": 0, **keys}
        changes = {"model": model, "parallel": parallel, "train": train}
        return tiny_config(changes, folders(run, load), {"scheduler": {"lr_warmup_iters": 1}})

    before = run_distributed(train, saved, config(saved, "one"))
    after = run_distributed(train, loaded, config(loaded, "two", load="one"))
    assert set(before[0][0]) == set(after[0][0])
    for name in before[0][0]:
        if name.field != "payload":
            for state, _ in (*before, *after):
                assert torch.equal(state[name], before[0][0][name]), name
            continue
        shape_of_whole = before[0][1][name.param].shape
        first, second = (
            put_together([(state[name], specs[name.param]) for state, specs in ranks])
            for ranks in (before, after)
        )
        assert first.shape == shape_of_whole
        assert torch.equal(first, second), name


def put_together(parts):
    """The logical tensor of every rank's payload and spec."""
    shape = parts[0][1].shape
    whole = torch.zeros(shape, dtype=parts[0][0].dtype)
    for payload, spec in parts:
        index = spec.shard_spec.element_index(shape).numbers(0, payload.numel(), payload.device)
        whole.view(-1)[index.long()] = payload.flatten()
    return whole


WIRES = [
    ("bf16", "bf16", "bf16", 2e-3),
    ("o3", "bf16", "bf16", 0.03),
    ("o3", "fp8", "bf16", 0.03),
    ("o3", "bf16", "fp8", 0.03),
    ("o3", "fp8", "fp8", 0.03),
]


@pytest.mark.parametrize(("preset", "gather", "reduce", "bound"), WIRES)
def test_curve_of_one_process(
    preset, gather, reduce, bound, tiny_config, run_distributed, tmp_path
):
    losses = []
    for ranks, parallel in ((1, {}), (2, PARALLEL)):
        folder = tmp_path / str(ranks)
        changes = {
            "parallel": parallel,
            "precision": {"preset": preset, "wire": {"gather": gather, "reduce": reduce}},
            "logging": {"dir": str(folder), "log_interval": 1},
            "train": {"eval_iters": 2},
        }
        run_distributed(train, ranks, tiny_config(changes))
        losses.append([line["lm loss"] for line in curve(folder) if "lm loss" in line])
    one, two = map(torch.tensor, losses)
    assert one[-1] < 0.9 * one[0]
    assert ((two - one).abs() / one).max() < bound


def test_bytes_are_counted_by_the_formula(tiny_config, run_distributed, tmp_path):
    logging = {"logging": {"dir": str(tmp_path), "log_interval": 1}, "parallel": PARALLEL}
    ((_, specs), _) = run_distributed(train, 2, tiny_config(logging))
    tokens, hidden, layers, microbatches = 2 * 16, 32, 2, 2
    block = tokens // 2 * hidden  # one byte each, to one other rank
    # Two column-parallel layers gather their input twice, two row-parallel ones their gradient
    # once; the head like the former, the embedding like the latter. Then each amax: 4 bytes.
    gathers, amaxes = layers * 6 + 3, layers * 4 + 2
    cross_entropy = 2 * 4 * tokens
    gather = microbatches * (gathers * block + amaxes * 4 + cross_entropy)
    # Four layers, head and embedding reduce-scatter once. What norms and biases need is fp32.
    partial = sum(spec.shape[0] for spec in specs.values() if spec.sequence_parallel)
    assert partial == 32 * (2 * 5 + 2 * 2)  # 5 norms of weight and bias, 2 biases per layer
    reduce = microbatches * (layers * 4 + 2) * (block + 16) + 2 * (partial // 2 * 4)
    for line in read(tmp_path):
        if "lm loss" in line:
            assert line["comm_bytes/tp_gather"] == gather
            # The step's scalars, gathered, and per weight four amaxes (gradient, states), reduced.
            assert line["comm_bytes/grads"] == 4 * (NUM_GATHERED + 4 * len(specs))
            assert line["comm_bytes/tp_reduce"] == reduce


def sent_by_layers(tokens, hidden, ranks, layers, fp8):
    """Bytes a rank's layers send for a micro-batch with sequence parallelism: (gather, reduce)."""
    block = tokens // ranks * hidden * (1 if fp8 else 2)
    gather = (ranks - 1) * (6 * layers + 3) * block
    reduce = (ranks - 1) * (4 * layers + 2) * (block + 16 * fp8)
    return gather, reduce


def test_fp8_wires_halve_the_bytes_of_a_run(tiny_config, run_distributed, tmp_path):
    tokens, hidden, layers = 4 * 64, 128, 2
    sent = {}
    for wire in ("fp8", "bf16"):
        changes = {
            "model": {"hidden_size": hidden, "num_attention_heads": 4, "seq_length": 64},
            "train": {"micro_batch_size": 4, "global_batch_size": 16, "train_iters": 2}
            | {"eval_iters": 0},
            "scheduler": {"lr_warmup_iters": 0},
            "precision": {"wire": {"gather": wire, "reduce": wire}},
            "parallel": PARALLEL,
            "logging": {"dir": str(tmp_path / wire), "log_interval": 1},
        }
        run_distributed(train, 2, tiny_config(changes))
        line = read(tmp_path / wire)[0]
        sent[wire] = line["comm_bytes/tp_gather"], line["comm_bytes/tp_reduce"]
    # What is the same on both wires: scalars of cross-entropy and optimizer, fp32 gradients.
    rest = []
    for wire, (gather, reduce) in sent.items():
        expected = sent_by_layers(tokens, hidden, 2, layers, wire == "fp8")
        rest.append((gather - 4 * expected[0], reduce - 4 * expected[1]))
    amaxes = 4 * (4 * layers + 2) * 4  # one for each gathered tensor that has a scale
    assert (rest[0][0] - amaxes, rest[0][1]) == rest[1]
    assert sum(sent["fp8"]) <= 0.51 * sum(sent["bf16"])


def generator_seed(config):
    train(config)
    return torch.initial_seed()


def test_attention_dropout_has_a_stream_per_rank(tiny_config, run_distributed):
    changes = {"parallel": PARALLEL, "model": {"attention_dropout": 0.1}}
    first = run_distributed(generator_seed, 2, tiny_config(changes))
    again = run_distributed(generator_seed, 2, tiny_config(changes))
    assert first == again
    assert first[0] != first[1]
    assert first != run_distributed(generator_seed, 2, tiny_config(changes, {"train": {"seed": 2}}))


def test_one_rank_sends_nothing(tiny_config, train_run, read_metrics, tmp_path):
    train_run(tiny_config({"logging": {"dir": str(tmp_path), "log_interval": 1}}))
    reports = [line for line in read_metrics(tmp_path) if "lm loss" in line]
    assert all(
        line["comm_bytes/tp_gather"] == line["comm_bytes/tp_reduce"] == 0 for line in reports
    )
