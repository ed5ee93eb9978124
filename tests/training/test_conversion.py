"""What a checkpoint of another precision becomes, on one process and on several, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import differences
from fp8lm.numerics import BF16, E4M3, FP16, FP32, ROOT_E4M4
from fp8lm.runtime.errors import InputError
from tests.training.contents import FORMATS, KERNELS, contents, expect, values
from tests.training.runs import LLAMA, read, save_again

SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "tp2": (2, {"parallel": SPLIT}),
    "dp2": (2, {"parallel": {"partition": "even"}}),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
}


@pytest.fixture
def saved(tiny_config, train_run, tmp_path):
    """`saved(preset)`: config for more, and the folder of a run of one process that was stopped."""

    def make(preset, *changes):
        def config(*more):
            return tiny_config({"model": LLAMA}, {"precision": {"preset": preset}}, *changes, *more)

        folder = tmp_path / preset
        train_run(config({"checkpoint": {"save": str(folder)}, "train": {"exit_interval": 4}}))
        return folder

    return make


def again(tiny_config, run_distributed, folder, preset, output, ranks=1, *changes):
    """The checkpoint of `folder` loaded under `preset` on `ranks` and saved at once."""
    config = tiny_config(
        {"model": LLAMA, "checkpoint": {"load": str(folder)}, "precision": {"preset": preset}},
        {"train": {"micro_batch_size": 1, "exit_interval": None}},
        *changes,
    )
    run_distributed(save_again, ranks, config, str(output), timeout=120)
    return contents(output)


@pytest.mark.slow
def test_bf16_to_fp8_and_back(saved, tiny_config, run_distributed, tmp_path):
    folder = saved("bf16")
    before = contents(folder)
    after = again(tiny_config, run_distributed, folder, "o3", tmp_path / "one")
    weights = [n.split(".", 2)[2].removesuffix(".payload") for n in before if ".exp_avg." in n]
    weights = [name for name in weights if not name.endswith(".scale")]
    assert len(weights) > 10
    for name in weights:
        master = values(before, f"optimizer.master.{name}")
        compute = FORMATS[after[f"model.{name}.payload"].dtype]
        assert (compute == E4M3) == ("linear" in name and "norm" not in name)
        expect(after, f"model.{name}", KERNELS.quantize(master, compute))
        expect(after, f"optimizer.master.{name}", KERNELS.quantize(master, FP16))
        for kind, fmt in (("exp_avg", E4M3), ("exp_avg_sq", FP16)):
            stored = values(before, f"optimizer.{kind}.{name}")
            expect(after, f"optimizer.{kind}.{name}", KERNELS.quantize(stored, fmt))
            assert stored.any()
        # What the next step's scales start from, which the unscaled states had no use for.
        moments = (values(before, f"optimizer.{kind}.{name}") for kind in ("exp_avg", "exp_avg_sq"))
        amax = [x.abs().max() for x in (master, *moments)]
        assert after[f"optimizer.amax.{name}"].tolist() == [x.item() for x in amax]
    for layout, (ranks, changes) in LAYOUTS.items():
        output = tmp_path / layout
        again(tiny_config, run_distributed, folder, "o3", output, ranks, changes)
        assert not list(differences(open_checkpoint(tmp_path / "one"), open_checkpoint(output)))
    back = again(
        tiny_config,
        run_distributed,
        tmp_path / "one",
        "bf16",
        tmp_path / "back",
        2,
        LAYOUTS["tp2"][1],
    )
    for name in weights:
        master = values(after, f"optimizer.master.{name}")
        expect(back, f"optimizer.master.{name}", KERNELS.quantize(master, FP32))
        if FORMATS[after[f"model.{name}.payload"].dtype] == BF16:  # stays as it was
            expect(back, f"model.{name}", KERNELS.quantize(values(after, f"model.{name}"), BF16))
        else:
            expect(back, f"model.{name}", KERNELS.quantize(master, BF16))
        for kind in ("exp_avg", "exp_avg_sq"):
            stored = values(after, f"optimizer.{kind}.{name}")
            expect(back, f"optimizer.{kind}.{name}", KERNELS.quantize(stored, FP32))


@pytest.mark.slow
def test_a_second_moment_becomes_its_root_and_comes_back(
    saved, tiny_config, run_distributed, tmp_path
):
    before = contents(saved("o3"))
    after = again(tiny_config, run_distributed, tmp_path / "o3", "o4", tmp_path / "o4")
    back = again(tiny_config, run_distributed, tmp_path / "o4", "o3", tmp_path / "back")
    split = again(
        tiny_config, run_distributed, tmp_path / "o4", "o4", tmp_path / "tp2", *LAYOUTS["tp2"]
    )
    names = [name for name in before if ".exp_avg_sq." in name and name.endswith(".payload")]
    assert len(names) > 10
    for name in (name.removesuffix(".payload") for name in names):
        root = KERNELS.quantize(values(before, name), ROOT_E4M4)
        expect(after, name, root)
        assert (root.payload != 0).all()
        expect(back, name, KERNELS.quantize(values(after, name), FP16))
    assert after.keys() == split.keys()
    assert all(torch.equal(after[name], split[name]) for name in after)


def test_a_weight_that_was_its_own_master_becomes_one(
    saved, tiny_config, run_distributed, tmp_path
):
    before = contents(saved("o2"))
    after = again(tiny_config, run_distributed, tmp_path / "o2", "o3", tmp_path / "after")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    for field in ("payload", "scale"):
        kept = after[f"optimizer.master.{name}.{field}"]
        assert torch.equal(kept, before[f"model.{name}.{field}"])
    expect(after, f"model.{name}", KERNELS.quantize(values(before, f"model.{name}"), E4M3))


def test_it_is_reported_and_trains_on(tiny_config, saved, train_run, folders, tmp_path, capsys):
    folder = saved("bf16")
    capsys.readouterr()
    more = folders("more", load=folder.name)
    train_run(tiny_config({"model": LLAMA}, more))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "converted:" in line]
    assert "exp_avg fp32 -> fp8_e4m3" in line and "master fp32 -> weight fp8_e4m3" in line
    losses = [line["lm loss"] for line in read(tmp_path / "more") if "lm loss" in line]
    assert len(losses) == 4 and max(losses) < 4.2  # it began at log(64) = 4.16


def test_another_shape_is_refused_before_anything_is_cast(saved, tiny_config, train_run):
    folder = saved("bf16")
    wider = {"model": LLAMA | {"ffn_hidden_size": 96}, "checkpoint": {"load": str(folder)}}
    with pytest.raises(InputError, match=r"linear_fc.*expected shape.*ffn_hidden_size = 96"):
        train_run(tiny_config(wider))
