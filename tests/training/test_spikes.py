"""Loss spikes: told from noise, rolled back from, and their data skipped."""

from __future__ import annotations

import math
import shutil
import time

import pytest
import torch

from fp8lm.checkpoint import background, find_checkpoint
from fp8lm.checkpoint.files import saved_iterations
from fp8lm.runtime.errors import RunFailed
from fp8lm.training import trainer as trainer_module
from fp8lm.training.spikes import LossSpike, LossSpikeDetector
from tests.training.runs import BeforeStep, curve, read

pytestmark = pytest.mark.slow


def watch(losses, threshold=0.5, patience=3):
    """The iteration that a spike began with, None without one, and the watch."""
    watching = LossSpikeDetector(threshold, patience)
    try:
        for iteration, loss in enumerate(losses, start=1):
            watching.add(iteration, loss)
    except LossSpike as spike:
        return spike.first, watching
    return None, watching


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        ([4.0, 3.0, 2.0, 2.0, 2.0], None),
        ([2.0, 2.0, 2.6, 2.6, 2.0, 2.6, 2.6, 2.0], None),  # twice two in a row
        ([2.0, 2.0, 2.6, 2.6, 2.6], 3),
        ([2.0, 2.4, 2.2, 9.0, 8.0, 7.0], 4),
        ([2.0, 2.0, math.nan, 2.6, math.nan, 2.6, math.inf, 2.6], 4),
        ([9.0, 9.0, 9.0], None),
    ],
)
def test_what_is_a_spike(losses, first):
    assert watch(losses)[0] == first
    assert watch(losses, threshold=None)[0] is None


def test_the_mean_forgets_and_high_losses_do_not_enter_it():
    _, watching = watch([3.0] * 100 + [2.0] * 400 + [4.0] * 2)
    assert watching.mean == pytest.approx(2.0, abs=0.02)
    assert (watching.high, watching.first) == (2, 501)
    again = LossSpikeDetector(0.5, 3)
    again.restore(watching.state)
    with pytest.raises(
        LossSpike, match=r"loss spike at iteration 501: 4.0000 after a mean of 2.01"
    ):
        again.add(503, 4.0)


class Garbled(torch.utils.data.Dataset):
    """A dataset with labels of `samples` that nothing could predict."""

    def __init__(self, dataset, samples):
        self.dataset, self.samples, self.read = dataset, samples, []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.read.append(index)
        item = dict(self.dataset[index])
        if index in self.samples:
            item["labels"] = (item["labels"] + 17) % 64
        return item


def garble(trainer, samples):
    """Give `trainer` a training set with bad `samples`."""
    train, *rest = trainer.run.datasets
    garbled = Garbled(train, samples)
    object.__setattr__(trainer.run, "datasets", (garbled, *rest))
    return garbled


@pytest.fixture
def config(tiny_config, tmp_path):
    def make(*changes, **train):
        return tiny_config(
            {
                "train": {
                    "train_iters": 20,
                    "loss_spike_threshold": 0.5,
                    "loss_spike_patience": 2,
                    "eval_iters": 0,
                }
                | train
            },
            {"checkpoint": {"save": str(tmp_path / "ck"), "save_interval": 4}},
            {"logging": {"dir": str(tmp_path / "log"), "log_interval": 1}},
            *changes,
        )

    return make


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_spike_is_rolled_back_and_its_data_skipped(
    asynchronous, config, train_run, tmp_path, capsys
):
    # Steps 15 and 16 are bad, and 16 is saved before anybody can know: back to 12, on with 17's.
    bad = range(4 * 14, 4 * 16)
    read_in = []
    changes = {"checkpoint": {"async_save": asynchronous}}
    trainer = train_run(config(changes), lambda trainer: read_in.append(garble(trainer, bad)))
    progress = trainer.progress
    assert (progress.iteration, progress.rollbacks, progress.skipped_samples) == (20, 1, 16)
    out = capsys.readouterr().out
    assert "loss spike at iteration 15: " in out
    assert "back at iteration 12, from which 16 samples are skipped" in out
    reports = read(tmp_path / "log")
    assert [line["iteration"] for line in reports] == list(range(1, 21))
    assert max(line["lm loss"] for line in reports[12:]) < reports[0]["lm loss"] + 0.2
    assert [line["rollbacks"] for line in reports] == [0] * 12 + [1] * 8
    # Each sample once in order, the bad ones never again; where the data end they begin anew.
    indices = read_in[0].read
    assert indices[: 4 * 16] == list(range(4 * 16))
    after = [index % len(read_in[0]) for index in range(4 * 16, 4 * 16 + 4 * 8)]
    assert indices[4 * 16 :] == after
    assert saved_iterations(tmp_path / "ck") == [20, 16, 12, 8, 4]


def test_a_run_resumed_after_a_rollback_goes_on_alike(config, train_run, tmp_path):
    bad = range(4 * 14, 4 * 16)

    def run(name, **train):
        folders = {
            "checkpoint": {key: str(tmp_path / name) for key in ("save", "load")},
            "logging": {"dir": str(tmp_path / f"{name} log")},
        }
        return train_run(config(folders, **train), lambda trainer: garble(trainer, bad))

    whole = run("whole")
    run("parts", exit_interval=18)
    assert find_checkpoint(tmp_path / "parts").common["skipped_samples"] == 16
    assert run("parts").losses.state == whole.losses.state
    assert curve(tmp_path / "parts log") == curve(tmp_path / "whole log")


def test_a_run_killed_before_it_saves_again_finds_the_spike_again(config, train_run, tmp_path):
    bad = range(4 * 14, 4 * 16)

    def run(name, prepare=lambda trainer: None):
        folders = {
            "checkpoint": {key: str(tmp_path / name) for key in ("save", "load")},
            "logging": {"dir": str(tmp_path / f"{name} log")},
        }

        def both(trainer):
            garble(trainer, bad)
            prepare(trainer)

        return train_run(config(folders), both)

    def die_after_the_rollback(trainer):
        trainer.hooks.append(BeforeStep(die))

    def die(trainer):
        if trainer.progress.rollbacks and trainer.progress.iteration == 14:
            raise KeyboardInterrupt

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", die_after_the_rollback)
    assert find_checkpoint(tmp_path / "parts").iteration == 12
    run("parts")
    assert curve(tmp_path / "parts log") == curve(tmp_path / "whole log")


def test_no_checkpoint_before_the_spike(config, train_run, capsys):
    changes = {"checkpoint": {"save_interval": 100}}
    trainer = train_run(config(changes), lambda trainer: garble(trainer, range(4 * 14, 4 * 16)))
    assert (trainer.progress.iteration, trainer.progress.rollbacks) == (20, 0)
    assert "no checkpoint before it" in capsys.readouterr().out


def test_what_is_due_in_the_iteration_of_a_spike_is_done_without_a_rollback(
    config, train_run, tmp_path
):
    # The spike of 15 is known in 16, where a report, a checkpoint and the end are due.
    changes = {"checkpoint": {"save_interval": 16}}
    trainer = train_run(
        config(changes, exit_interval=16),
        lambda trainer: garble(trainer, range(4 * 14, 4 * 16)),
    )
    assert (trainer.progress.iteration, trainer.progress.rollbacks) == (16, 0)
    assert [line["iteration"] for line in read(tmp_path / "log")] == list(range(1, 17))
    assert saved_iterations(tmp_path / "ck") == [16]


class Late:
    """Numbers that arrive one step later, as from a GPU."""

    def __init__(self):
        self.arriving = None

    def push(self, iteration, numbers):
        arrived, self.arriving = self.arriving, (iteration, numbers.tolist())
        return arrived

    def drain(self):
        arrived, self.arriving = self.arriving, None
        return arrived


def test_a_number_under_way_is_left_behind(config, train_run, monkeypatch):
    # The spike of 15 is known in 16: the loss of 16 must not be looked at from 12.
    monkeypatch.setattr(trainer_module, "AsyncScalars", Late)
    trainer = train_run(
        config(loss_spike_patience=1, max_rollbacks=1),
        lambda trainer: garble(trainer, range(4 * 14, 4 * 16)),
    )
    assert (trainer.progress.iteration, trainer.progress.rollbacks) == (20, 1)
    assert trainer.losses.high == 0


def test_a_rollback_to_what_the_run_began_with(config, train_run, tmp_path, capsys):
    source = {"checkpoint": {"save": str(tmp_path / "source")}}
    train_run(config(source, exit_interval=14))
    changes = {"checkpoint": {"load": str(tmp_path / "source"), "save_interval": 15}}
    trainer = train_run(config(changes), lambda trainer: garble(trainer, range(4 * 14, 4 * 16)))
    assert "loss spike at iteration 15: " in (out := capsys.readouterr().out)
    assert "back at iteration 14, from which 8 samples are skipped" in out
    assert (trainer.progress.iteration, trainer.progress.rollbacks) == (20, 1)
    assert saved_iterations(tmp_path / "source") == [14, 12, 8, 4]
    assert saved_iterations(tmp_path / "ck") == [20, 15]
    assert find_checkpoint(tmp_path / "ck", up_to=15).common["skipped_samples"] == 8


def test_a_newer_checkpoint_that_cannot_be_deleted_stops_no_rollback(
    config, train_run, tmp_path, capsys, monkeypatch
):
    delete = shutil.rmtree

    def refuse(path, **options):
        if "0000015." in str(path):
            raise PermissionError(f"no permission to delete {path}")
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    changes = {"checkpoint": {"save_interval": 5}}
    trainer = train_run(config(changes), lambda trainer: garble(trainer, range(4 * 14, 4 * 16)))
    assert (trainer.progress.iteration, trainer.progress.rollbacks) == (20, 1)
    assert "newer checkpoints than 10" in capsys.readouterr().out
    assert saved_iterations(tmp_path / "ck") == [20, 15, 10, 5]


def test_no_whole_checkpoint_before_the_spike(config, train_run, tmp_path, capsys):
    def prepare(trainer):
        garble(trainer, range(4 * 14, 4 * 16))
        trainer.hooks.append(BeforeStep(damage))

    def damage(trainer):
        if trainer.progress.iteration == 13:
            (tmp_path / "ck" / "iter_0000012" / "common.json").write_text("{")

    trainer = train_run(config({"checkpoint": {"save_interval": 12}}), prepare)
    assert (trainer.progress.iteration, trainer.progress.rollbacks) == (20, 0)
    out = capsys.readouterr().out
    assert " warning: no valid checkpoint in" in out and "common.json is damaged" in out


def test_a_save_under_way_is_waited_for_when_too_many_rollbacks_stop_the_run(
    config, train_run, tmp_path, monkeypatch
):
    write, begun = background.save_checkpoint, []

    def write_slowly(root, iteration, *more):
        begun.append(iteration)
        time.sleep(0.3 if iteration > 12 else 0)
        write(root, iteration, *more)

    def slow(trainer):
        monkeypatch.setattr(background, "save_checkpoint", write_slowly)
        garble(trainer, range(4 * 14, 400))

    asynchronous = {"checkpoint": {"async_save": True, "save_interval": 1}}
    with pytest.raises(RunFailed):
        train_run(config(asynchronous, max_rollbacks=1), slow)
    assert find_checkpoint(tmp_path / "ck").iteration == begun[-1] > 12


def test_too_many_rollbacks_stop_the_run(config, train_run, tmp_path):
    with pytest.raises(RunFailed, match=r"after 2 rollbacks \(train.max_rollbacks\): stopped"):
        train_run(config(max_rollbacks=2), lambda trainer: garble(trainer, range(4 * 14, 400)))
    assert find_checkpoint(tmp_path / "ck").iteration == 12
