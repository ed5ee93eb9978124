"""The training loop: what it reports, what it skips, when it stops."""

from __future__ import annotations

import math

import pytest
import torch

from fp8lm.checkpoint import latest_iteration
from fp8lm.config import load_config
from fp8lm.runtime.errors import InputError, RunFailed
from fp8lm.training.builders import resolve_device
from fp8lm.training.state import model_tensors, optimizer_tensors
from tests.training.runs import APART, BeforeStep

pytestmark = pytest.mark.slow

REPORTED = {
    "iteration",
    "consumed_samples",
    "lm loss",
    "learning-rate",
    "batch-size",
    "grad-norm",
    "params-norm",
    "throughput",
    "timestamp",
    "iteration-time",
    "skipped iterations",
    "nan iterations",
    *(
        f"state_bytes/{kind}"
        for kind in ("weights", "grads", "operands", "master", "exp_avg", "exp_avg_sq")
    ),
}


class PoisonedDataset(torch.utils.data.Dataset):
    """A dataset whose samples in `poisoned` have a NaN in their loss mask."""

    def __init__(self, dataset, poisoned):
        self.dataset, self.poisoned = dataset, poisoned

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = dict(self.dataset[index])
        if index in self.poisoned:
            item["loss_mask"] = torch.full_like(item["loss_mask"], float("nan"))
        return item


def poison(trainer, samples):
    """Give `trainer` a training set with NaN in `samples`."""
    train, *rest = trainer.run.datasets
    object.__setattr__(trainer.run, "datasets", (PoisonedDataset(train, samples), *rest))


def all_state(trainer):
    run = trainer.run
    tensors = model_tensors(run.weights) | optimizer_tensors(run.optimizer)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_run_opens_with_model_machine_batch_and_folders(
    tiny_config, train_run, read_metrics, tmp_path, capsys
):
    folders = {"checkpoint": {"save": str(tmp_path / "ck")}, "logging": {"dir": str(tmp_path)}}
    train_run(tiny_config(folders))
    opening = capsys.readouterr().out.partition("validation loss")[0]
    parameters = next(line["parameters"] for line in read_metrics(tmp_path) if "lm loss" in line)
    for text in (f"{parameters:,} parameters", "CPU", "TP 1, PP 1, DP 1", "kernels: ", "64 tokens"):
        assert text in opening
    assert f"checkpoint.save={tmp_path / 'ck'}" in opening
    assert f"logging.dir={tmp_path}" in opening


def test_a_run_with_documents_apart_opens_with_what_attends(tiny_config, train_run, capsys):
    short = {"train": {"train_iters": 3, "eval_iters": 0}}
    train_run(tiny_config(short, APART))
    opening = capsys.readouterr().out.partition("lm loss")[0]
    [line] = [line for line in opening.splitlines() if line.startswith(" documents: ")]
    assert "data.reset_attention_mask" in line and "data.eod_mask_loss" in line
    assert "documents apart: a mask" in line and "FLOPs are counted as if" in line


def test_samples_of_one_document_train_as_without_the_keys(tiny_config, train_run):
    """Every bit of the state, where no sample of the data has an end of a document."""
    short = {"train": {"train_iters": 3, "eval_iters": 0}}
    model = {"model": {"position_embedding_type": "learned_absolute"}}
    of_one = {"data": {"shuffle_seed": 7}, "tokenizer": {"vocab_size": 256}}
    apart = {"data": {"reset_position_ids": True, "reset_attention_mask": True}}
    runs = [train_run(tiny_config(short, model, of_one, *keys)) for keys in ((), (apart,))]
    dataset = runs[1].run.datasets[0]
    assert all((dataset[i]["document_starts"] == 0).all() for i in range(12))
    plain, same = map(all_state, runs)
    assert all(torch.equal(plain[name], same[name]) for name in plain)


@pytest.mark.parametrize(("preset", "warned"), [("o3", True), ("o3_long", False)])
def test_a_run_that_sums_many_micro_batches_in_e4m3_opens_with_what_it_loses(
    preset, warned, tiny_config, train_run, capsys
):
    model = {"hidden_size": 64, "num_attention_heads": 2}  # o3_long's blocks want a multiple of 16
    overrides = {"model": model, "precision": {"preset": preset}}
    train = {"train_iters": 1, "eval_iters": 0, "micro_batch_size": 1, "global_batch_size": 16}
    train_run(tiny_config(overrides, {"train": train, "scheduler": {"lr_warmup_iters": 0}}))
    opening = capsys.readouterr().out.partition("lm loss")[0]
    assert ("16 micro-batches a step" in opening) == warned


def test_metrics_have_every_promised_key(tiny_config, train_run, read_metrics, tmp_path):
    config = tiny_config({"logging": {"dir": str(tmp_path), "log_interval": 1}})
    train_run(config)
    reports = [line for line in read_metrics(tmp_path) if "lm loss" in line]
    assert [line["iteration"] for line in reports] == list(range(1, 9))
    assert all(line.keys() >= REPORTED for line in reports)
    assert [line["consumed_samples"] for line in reports] == list(range(4, 33, 4))
    validation = [line for line in read_metrics(tmp_path) if "lm loss validation" in line]
    assert [line["iteration"] for line in validation] == [0, 4, 8]
    # Untrained: close to uniform over the 64 tokens; rows that pad the vocabulary do not count.
    assert abs(validation[0]["lm loss validation"] - math.log(64)) < 0.1
    assert load_config(tmp_path / "config.yaml", []) == config


@pytest.mark.parametrize(("preset", "expected"), [("o3", 7), ("o2", 7), ("bf16", 18)])
def test_state_bytes_per_parameter_of_linear_layers(
    preset, expected, tiny_config, train_run, read_metrics, tmp_path
):
    # o2: weight 2 (the master itself), its FP8 copy for a step 1, gradient 1, m 1, v 2;
    # bf16: 2 + 4 + 4 + 4 + 4.
    sizes = {"hidden_size": 64, "num_attention_heads": 2}
    logging = {"dir": str(tmp_path), "log_interval": 1}
    config = tiny_config(
        {"precision": {"preset": preset}, "model": sizes, "logging": logging},
        {"train": {"train_iters": 1, "eval_iters": 0}, "scheduler": {"lr_warmup_iters": 0}},
    )
    train_run(config)
    (report,) = read_metrics(tmp_path)
    # One fp32 scale per tensor is all that comes on top.
    assert expected <= report["state_bytes_per_linear_parameter"] < expected + 0.005


def test_a_nan_step_is_skipped_counted_and_changes_no_byte(
    tiny_config, train_run, read_metrics, tmp_path
):
    config = tiny_config({"logging": {"dir": str(tmp_path), "log_interval": 1}})
    states = []

    def prepare(trainer):
        poison(trainer, {9})  # in the third step
        trainer.hooks.append(BeforeStep(lambda trainer: states.append(all_state(trainer))))

    train_run(config, prepare)
    reports = [line for line in read_metrics(tmp_path) if "lm loss" in line]
    assert [line["skipped iterations"] for line in reports] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert [line["nan iterations"] for line in reports] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert reports[2]["lm loss"] is None and reports[2]["grad-norm"] is None
    before, after, later = states[2], states[3], states[4]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert math.isfinite(reports[-1]["lm loss"])


def test_the_average_of_a_report_leaves_skipped_steps_out(
    tiny_config, train_run, read_metrics, tmp_path
):
    folders = {name: tmp_path / name for name in ("single", "averaged")}
    for name, interval in (("single", 1), ("averaged", 4)):
        logging = {"dir": str(folders[name]), "log_interval": interval}
        train_run(tiny_config({"logging": logging}), lambda trainer: poison(trainer, {9}))
    single = [line["lm loss"] for line in read_metrics(folders["single"]) if "lm loss" in line]
    averaged = [line for line in read_metrics(folders["averaged"]) if "lm loss" in line]
    kept = [loss for loss in single[:4] if loss is not None]
    assert averaged[0]["lm loss"] == pytest.approx(sum(kept) / 3, rel=1e-12)
    assert averaged[0]["skipped iterations"] == 1


def test_too_many_skips_in_a_row_stop_the_run_with_a_checkpoint(tiny_config, train_run, tmp_path):
    config = tiny_config(
        {"train": {"max_consecutive_skips": 2}, "logging": {"log_interval": 1}},
        {"checkpoint": {"save": str(tmp_path)}},
    )
    with pytest.raises(RunFailed, match="2 steps in a row were skipped"):
        train_run(config, lambda trainer: poison(trainer, range(8, 100)))
    assert latest_iteration(tmp_path) == 4


def test_a_finished_run_does_nothing_again(tiny_config, train_run, read_metrics, tmp_path, capsys):
    folders = {"checkpoint": {key: str(tmp_path / "ck") for key in ("save", "load")}}
    config = tiny_config(folders, {"logging": {"dir": str(tmp_path)}})
    train_run(config)
    lines = read_metrics(tmp_path)
    train_run(config)
    assert read_metrics(tmp_path) == lines
    assert "nothing left to do: 8 iterations done" in capsys.readouterr().out


def test_exit_interval_saves_and_stops(tiny_config, train_run, tmp_path):
    changes = {"train": {"exit_interval": 3}, "checkpoint": {"save": str(tmp_path)}}
    trainer = train_run(tiny_config(changes))
    assert trainer.progress.iteration == 3
    assert latest_iteration(tmp_path) == 3


def test_an_unwritable_save_folder_is_found_before_training(tiny_config, train_run, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config({"checkpoint": {"save": str(tmp_path / "file" / "ck")}})
    with pytest.raises(InputError, match="file"):
        train_run(config)


@pytest.mark.parametrize("preset", ["bf16", "te", "o1", "o2", "o3"])
def test_every_preset_learns(preset, tiny_config, train_run, read_metrics, tmp_path):
    """The chain's entropy is near 1.7 nats; 120 steps must get from 4.2 to well below 2.5."""
    config = tiny_config(
        {"precision": {"preset": preset}, "logging": {"dir": str(tmp_path)}},
        {"train": {"train_iters": 120, "eval_interval": 120, "global_batch_size": 16}},
        {"train": {"micro_batch_size": 16}},
    )
    train_run(config)
    losses = [line["lm loss"] for line in read_metrics(tmp_path) if "lm loss" in line]
    assert losses[-1] < 2.5 < 3.5 < losses[0]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_amd_gpus_are_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(InputError, match=r"ROCm build .* use an NVIDIA GPU or train.device=cpu"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_one_clear_message():
    with pytest.raises(InputError, match=r"train.device=cuda, but .* sees no GPU"):
        resolve_device("cuda")
