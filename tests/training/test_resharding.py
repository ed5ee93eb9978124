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


@pytest.mark.parametrize(("shape", "preset"), [("gpt", "o3"), ("llama", "o2")])
def test_every_byte_survives_every_layout(
    shape, preset, config, run_distributed, folders, tmp_path
):
    def of(parallel, *changes):
        precision, model = {"preset": preset}, MODELS[shape]
        return config(parallel, *changes, model=model, precision=precision)

    ranks, parallel = TP2_PP2_DP2
    run_distributed(train, ranks, of(parallel, folders("first")), timeout=120)
    first = open_checkpoint(tmp_path / "first")
    assert_amax_of_the_whole(first)
    former = "first"
    for name, (ranks, parallel) in LAYOUTS.items():
        again = of(parallel, {"checkpoint": {"load": str(tmp_path / former)}})
        run_distributed(save_again, ranks, again, str(tmp_path / name), timeout=120)
        assert list(differences(first, open_checkpoint(tmp_path / name))) == [], name
        former = name


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


# In fp32 the layouts differ in the order of their sums alone, 2^-24 each, some hundred of them.
def test_the_next_steps_are_those_of_every_layout(config, run_distributed, folders, tmp_path):
    def of(parallel, *changes):
        return config(parallel, *changes, model=MODELS["llama"], precision=FP32)

    def losses(run):
        return [line["lm loss"] for line in read(tmp_path / run) if line["iteration"] > 2]

    ranks, parallel = TP2_PP2_DP2
    first = {"train": {"exit_interval": 2}}
    run_distributed(train, ranks, of(parallel, folders("first"), first), timeout=120)
    run_distributed(train, ranks, of(parallel, folders("go on", load="first")), timeout=120)
    expected = losses("go on")
    assert len(expected) == 2
    for name, (ranks, parallel) in LAYOUTS.items():
        run_distributed(train, ranks, of(parallel, folders(name, load="first")), timeout=120)
        assert losses(name) == pytest.approx(expected, rel=1e-5), name
