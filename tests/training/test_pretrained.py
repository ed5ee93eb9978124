"""A new run from the weights of a checkpoint, of any layout and precision; and its restart."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import copy_checkpoint, differences
from fp8lm.numerics import BF16, E4M3, FP16, FP32
from fp8lm.runtime.errors import InputError
from tests.training.contents import FORMATS, KERNELS, contents, expect, values
from tests.training.runs import LLAMA, curve, save_again, train

pytestmark = pytest.mark.slow

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {"tp2": TP2, "pp2": PP2, "dp2 even": {"partition": "even"}}
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture
def trained(tiny_config, train_run, tmp_path):
    """`trained(preset)`: the folder of a finished run of one process."""

    def make(preset):
        folder = tmp_path / preset
        keys = {"model": LLAMA, "checkpoint": {"save": str(folder)}}
        train_run(tiny_config(keys, {"precision": {"preset": preset}}))
        return folder

    return make


@pytest.fixture
def started(tiny_config, run_distributed, tmp_path):
    """`started(pretrained, preset)`: the checkpoint of a run that has done nothing yet."""

    def make(pretrained, preset, output="started", ranks=1, parallel=None):
        config = tiny_config(
            {"model": LLAMA, "checkpoint": {"pretrained": str(pretrained)}},
            {"precision": {"preset": preset}, "parallel": parallel or {}},
            {"train": {"micro_batch_size": 1}},
        )
        run_distributed(save_again, ranks, config, str(tmp_path / output))
        return tmp_path / output

    return make


def release(folder, output):
    """As tools/checkpoint.py release does it."""
    checkpoint = open_checkpoint(folder)
    copy_checkpoint(checkpoint, output, lambda n: n.startswith("model."), {"released": True})
    return output


def names(tensors):
    """The weights of a checkpoint."""
    ends = [name.partition("model.")[2] for name in tensors if name.startswith("model.")]
    found = {name.removesuffix(".payload") for name in ends if name.endswith(".payload")}
    assert len(found) > 10
    return found


@pytest.mark.parametrize("preset", ["o3", "o2", "bf16"])
def test_same_preset_same_bytes_and_all_else_anew(preset, trained, started):
    former = trained(preset)
    before, folder = contents(former), started(former, preset)
    after, common = contents(folder), open_checkpoint(folder).common
    kept = [n for n in before if n.startswith(("model.", "optimizer.master."))]
    for name in kept:
        pair = (tensor[name].reshape(-1).view(torch.uint8) for tensor in (after, before))
        assert torch.equal(*pair), name
    assert after["optimizer.num_steps"] == common["iteration"] == common["consumed_samples"] == 0
    for name in names(after):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert values(before, f"optimizer.{kind}.{name}").any()
            assert not values(after, f"optimizer.{kind}.{name}").any()
        own = "model" if f"optimizer.master.{name}.payload" not in after else "optimizer.master"
        amax = values(after, f"{own}.{name}").abs().max()
        assert after[f"optimizer.amax.{name}"].tolist() == [amax.item(), 0, 0]


@pytest.mark.parametrize(("former", "preset", "fmt"), [("o3", "bf16", FP32), ("bf16", "o3", FP16)])
def test_another_preset(former, preset, fmt, trained, started):
    folder = trained(former)
    before, after = contents(folder), contents(started(folder, preset))
    for name in names(after):
        master = values(before, f"optimizer.master.{name}")
        weight, own = f"model.{name}", FORMATS[after[f"model.{name}.payload"].dtype]
        expect(after, f"optimizer.master.{name}", KERNELS.quantize(master, fmt))
        if FORMATS[before[f"{weight}.payload"].dtype] == own:  # a norm's or a table's
            assert torch.equal(after[f"{weight}.payload"], before[f"{weight}.payload"])
        else:
            expect(after, weight, KERNELS.quantize(master, own))
    assert FORMATS[after[f"model.{QKV}.payload"].dtype] == (E4M3 if preset == "o3" else BF16)


@pytest.mark.parametrize("former", ["o3", "bf16"])
def test_weights_alone(former, trained, started, tmp_path):
    """A release has no master: that is made of the weight, which is exact from FP8 to FP16."""
    folder = release(trained(former), tmp_path / "release")
    before, after = contents(folder), contents(started(folder, "o3"))
    assert not any(name.startswith("optimizer") for name in before)
    for name in names(after):
        weight = values(before, f"model.{name}")
        expect(after, f"optimizer.master.{name}", KERNELS.quantize(weight, FP16))
        if former == "o3":
            assert torch.equal(values(after, f"model.{name}"), weight)
            assert torch.equal(values(after, f"optimizer.master.{name}"), weight)
        elif name == QKV:
            expect(after, f"model.{name}", KERNELS.quantize(weight, E4M3))


@pytest.mark.parametrize("former", ["o3", "bf16"])
def test_every_layout_starts_from_the_same_bytes(former, trained, started, tmp_path):
    one = open_checkpoint(started(trained(former), "o3", "one"))
    for layout, parallel in LAYOUTS.items():
        other = started(tmp_path / former, "o3", layout, 2, parallel)
        assert not list(differences(one, open_checkpoint(other)))
        # And written by that layout they are those of the run that goes on from it.
        again = started(other, "o3", f"{layout}, again")
        assert not list(differences(one, open_checkpoint(again)))


def test_a_restart_resumes_even_without_the_weights(
    trained, tiny_config, train_run, folders, tmp_path, capsys
):
    def config(run, **keys):
        places = folders(run)
        places["checkpoint"]["pretrained"] = str(tmp_path / "o3")
        return tiny_config({"model": LLAMA, "precision": {"preset": "o3"}}, places, {"train": keys})

    trained("o3")
    train_run(config("whole"))
    train_run(config("parts", exit_interval=2))
    said = capsys.readouterr().out
    assert said.count(f"checkpoint.pretrained: {tmp_path / 'o3'}, iteration 8") == 2
    shutil.rmtree(tmp_path / "o3")
    train_run(config("parts"))
    said = capsys.readouterr().out
    assert "loaded checkpoint of iteration 2" in said and "not read" in said
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    first = curve(tmp_path / "whole")[0]
    assert first["lm loss validation"] < 4.0  # initial weights begin at log(64) = 4.16
    with pytest.raises(InputError, match=r"no checkpoint in checkpoint\.pretrained"):
        train_run(config("new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": {"num_layers": 1}}, "num_layers"),
        ({"model": {"num_layers": 4}}, "num_layers"),
        ({"model": {"ffn_hidden_size": 96}}, "ffn_hidden_size"),
        ({"model": {"normalization": "LayerNorm"}}, "normalization"),
        ({"tokenizer": {"vocab_size": 31}}, "32 tokens"),
        ({"tokenizer": {"vocab_size": 127}}, "checkpoint.extend_embeddings"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_of_another_model_are_refused(
    keys, says, ranks, trained, tiny_config, run_distributed, tmp_path
):
    places = {"checkpoint": {"pretrained": str(trained("o3"))}}
    config = tiny_config({"model": LLAMA, "parallel": TP2 if ranks == 2 else {}}, places, keys)
    with pytest.raises(InputError, match=f"^checkpoint.pretrained = .*{says}"):
        run_distributed(train, ranks, config)


def test_new_tokens_get_initial_values(trained, tiny_config, train_run, tmp_path):
    keys = {
        "pretrained": str(trained("o3")),
        "extend_embeddings": True,
        "save": str(tmp_path / "n"),
    }
    trainer = train_run(
        tiny_config(
            {"model": LLAMA, "checkpoint": keys, "tokenizer": {"vocab_size": 127}},
            {"train": {"exit_interval": 2}},
        )
    )
    assert trainer.run.vocab_size == 128
    assert len(contents(tmp_path / "n")["model.embedding.word_embeddings.weight.payload"]) == 128
