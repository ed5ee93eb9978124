"""A checkpoint of any layout is that of every other: the same bytes, and the training goes on."""

from __future__ import annotations

import pytest
import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import differences, read_tensor, stored_tensors
from tests.training.runs import LLAMA, read, save_again, train

pytestmark = pytest.mark.slow

FP32 = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32", "wire": {"grads": "fp32"}}
MODEL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
BATCH = {"micro_batch_size": 1, "global_batch_size": 8, "train_iters": 4, "eval_iters": 0}
SP = {"sequence_parallel": True}
EVEN = {"partition": "even"}


def layout(tp=1, pp=1, **keys):
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **keys}


TP2_PP2_DP2 = (8, layout(2, 2, **SP, **EVEN))
LAYOUTS = {
    "one": (1, {}),
    "tp4": (4, layout(4)),
    "tp4 sp": (4, layout(4, **SP)),
    "pp4": (4, layout(1, 4)),
    "dp8": (8, {}),
    "dp8 even": (8, EVEN),
    "dp4 plain": (4, {"use_distributed_optimizer": False}),
    "pp2 interleaved": (2, layout(1, 2, num_layers_per_virtual_pipeline_stage=1)),
    "pp2 uneven dp2": (4, layout(1, 2, decoder_first_pipeline_num_layers=1)),
    "pp2 uneven dp4 even": (8, layout(1, 2, decoder_first_pipeline_num_layers=1, **EVEN)),
    "dp2 tp2 overlapped": (4, layout(2, **SP, overlap_param_gather=True)),
    "back": TP2_PP2_DP2,
}
# Every layout is that of a source and of a target; "one" follows the last of each.
CHAINS = [
    ("tp4", "tp4 sp", "dp2 tp2 overlapped"),
    ("pp4", "pp2 interleaved", "dp8"),
    ("dp4 plain", "pp2 uneven dp2", "dp8 even"),
    ("pp2 uneven dp4 even", "back"),
]
# Every tensor-parallel rank shares the one query group with the others.
SHARED = {"num_query_groups": 1, "kv_channels": 32}
MODELS = {"gpt": {"position_embedding_type": "learned_absolute"}, "llama": LLAMA | SHARED}


@pytest.fixture
def config(tiny_config):
    def make(parallel, *changes, model, precision):
        return tiny_config(
            {"model": MODEL | model, "train": BATCH, "scheduler": {"lr_warmup_iters": 1}},
            {"parallel": parallel, "precision": precision},
            *changes,
        )

    return make


@pytest.fixture
def config_of(config):
    """`config_of(case, parallel, *changes)`: of a model's shape and precision."""

    def make(case, parallel, *changes):
        shape, preset = case
        precision = {"preset": preset}
        return config(parallel, *changes, model=MODELS[shape], precision=precision)

    return make


@pytest.fixture(scope="module")
def first(run_distributed, tmp_path_factory):
    """`first(case, make)`: the folder of a checkpoint trained under TP2_PP2_DP2, made once."""
    made = {}

    def folder(case, make):
        if case not in made:
            path = tmp_path_factory.mktemp("first")
            ranks, parallel = TP2_PP2_DP2
            short = {"checkpoint": {"save": str(path)}, "train": {"train_iters": 2}}
            run_distributed(train, ranks, make(case, parallel, short), timeout=120)
            made[case] = path
        return made[case]

    return folder


CASES = [("gpt", "o3"), ("llama", "o2")]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_first_knows_the_amax_of_the_whole(case, config_of, first):
    assert_amax_of_the_whole(open_checkpoint(first(case, config_of)))


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("chain", CHAINS, ids=" > ".join)
def test_every_byte_survives_every_layout(chain, case, config_of, first, run_distributed, tmp_path):
    """Each layout of a chain loads what the one before it has saved; the last loads all again."""
    start = former = first(case, config_of)
    for number, name in enumerate((*chain, "one")):
        (ranks, parallel), folder = LAYOUTS[name], tmp_path / str(number)
        again = config_of(case, parallel, {"checkpoint": {"load": str(former)}})
        run_distributed(save_again, ranks, again, str(folder), timeout=120)
        assert list(differences(open_checkpoint(start), open_checkpoint(folder))) == [], name
        former = folder


def assert_amax_of_the_whole(checkpoint):
    """Ranks know the amax of what they step; the scales of the next step need all of them."""
    tensors = {name: read_tensor(checkpoint, t) for name, t in stored_tensors(checkpoint).items()}
    for name in (n.removeprefix("optimizer.amax.") for n in tensors if ".amax." in n):
        master = f"optimizer.master.{name}"
        if f"{master}.payload" not in tensors:  # the weight is its own
            master = f"model.{name}"
        kinds = master, f"optimizer.exp_avg.{name}", f"optimizer.exp_avg_sq.{name}"
        for kind, amax in zip(kinds, tensors[f"optimizer.amax.{name}"].tolist(), strict=True):
            payload = tensors[f"{kind}.payload"]
            largest = payload.double().abs().max() / tensors[f"{kind}.scale"].double()
            # It was taken before the values were rounded.
            rounding = torch.finfo(payload.dtype).eps
            assert amax == pytest.approx(largest.item(), rel=rounding), (name, kind)


@pytest.fixture(scope="module")
def continued(run_distributed, tmp_path_factory):
    """`continued(make)`: a checkpoint in fp32, and the losses after it under TP2_PP2_DP2."""
    made = []

    def go_on(make):
        if not made:
            path = tmp_path_factory.mktemp("continued")
            ranks, parallel = TP2_PP2_DP2
            stop = {"train": {"exit_interval": 2}}
            run_distributed(train, ranks, make(parallel, run_of(path / "first"), stop), timeout=120)
            made.extend(
                (path / "first", next_losses(make, path / "first", path / "on", *TP2_PP2_DP2))
            )
        return made

    def next_losses(make, first, folder, ranks, parallel):
        run_distributed(train, ranks, make(parallel, run_of(folder, load=first)), timeout=120)
        return [line["lm loss"] for line in read(folder) if line["iteration"] > 2]

    return go_on, next_losses


def run_of(folder, load=None):
    return {
        "checkpoint": {"save": str(folder), "load": str(load or folder)},
        "logging": {"dir": str(folder), "log_interval": 1},
    }


# In fp32 the layouts differ in the order of their sums alone, 2^-24 each, some hundred of them.
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_next_steps_are_those_of_every_layout(name, config, continued, tmp_path):
    def make(parallel, *changes):
        return config(parallel, *changes, model=MODELS["llama"], precision=FP32)

    go_on, next_losses = continued
    first, expected = go_on(make)
    assert len(expected) == 2
    found = next_losses(make, first, tmp_path / "run", *LAYOUTS[name])
    assert found == pytest.approx(expected, rel=1e-5)
