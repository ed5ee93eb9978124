"""A run goes on with another batch: iterations stay iterations, schedules do not jump."""

from __future__ import annotations

import pytest

from tests.training.runs import read

pytestmark = pytest.mark.slow


@pytest.fixture
def resume(tiny_config, train_run, folders, tmp_path):
    """`resume(train)` goes on from iteration 4 of 8, which read batches of 4; its reports."""

    def run(changed, scheduler=None, first=None):
        scheduler = {"scheduler": {"lr_decay_style": "linear", **(scheduler or {})}}
        first = {"train": {"exit_interval": 4, **(first or {})}}
        train_run(tiny_config(folders("run"), scheduler, first))
        trainer = train_run(tiny_config(folders("run"), scheduler, {"train": changed}))
        return trainer, [line for line in read(tmp_path / "run") if "lm loss" in line]

    return run


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_iterations_stay_iterations(batch, resume, capsys):
    trainer, reports = resume({"global_batch_size": batch})
    assert [line["iteration"] for line in reports] == list(range(1, 9))
    assert [line["batch-size"] for line in reports] == [4] * 4 + [batch] * 4
    assert reports[-1]["consumed_samples"] == 16 + 4 * batch == len(trainer.run.datasets[0])
    # Warm-up over two steps, then down in six: what it would have been with the same batch.
    rates = [0, 5e-3, *(1e-2 - 9e-3 * step / 6 for step in range(6))]
    assert [line["learning-rate"] for line in reports] == pytest.approx(rates)
    out = capsys.readouterr().out
    assert ("the batch has changed" in out) == (batch != 4)
    assert "8/8" in out.replace(" ", "")


def test_micro_batch_and_length_may_change_too(resume):
    changed = {"global_batch_size": 6, "micro_batch_size": 1, "train_iters": 10}
    trainer, reports = resume(changed)
    assert [line["iteration"] for line in reports] == list(range(1, 11))
    assert reports[-1]["consumed_samples"] == 16 + 6 * 6 == len(trainer.run.datasets[0])


def test_what_is_left_is_counted_again_when_the_batch_changes_twice(
    resume, train_run, tiny_config, folders
):
    resume({"global_batch_size": 8, "exit_interval": 6})
    trainer = train_run(tiny_config(folders("run"), {"train": {"global_batch_size": 2}}))
    assert (trainer.progress.iteration, trainer.progress.consumed_samples) == (8, 36)


def test_samples_stay_samples(resume, capsys):
    length = {"train_iters": None, "train_samples": 30}
    scheduler = {"lr_warmup_iters": 0, "lr_warmup_samples": 8}
    trainer, reports = resume({"global_batch_size": 6, **length}, scheduler, length)
    assert [line["consumed_samples"] for line in reports] == [4, 8, 12, 16, 22, 28]
    assert len(trainer.run.datasets[0]) == 30
    rates = [0, 5e-3, *(1e-2 - 9e-3 * (n - 8) / 22 for n in (8, 12, 16, 22))]
    assert [line["learning-rate"] for line in reports] == pytest.approx(rates)
    assert "6/6" in capsys.readouterr().out.replace(" ", "")


def test_from_iterations_to_samples(resume):
    changed = {"train_iters": None, "train_samples": 32, "global_batch_size": 8}
    _, reports = resume(changed, {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.25})
    assert [line["consumed_samples"] for line in reports] == [4, 8, 12, 16, 24, 32]
    rates = [0, 5e-3, *(1e-2 - 9e-3 * (n - 8) / 24 for n in (8, 12, 16, 24))]
    assert [line["learning-rate"] for line in reports] == pytest.approx(rates)
