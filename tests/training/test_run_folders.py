"""Whose folders are a run's while it lives, and what it does when they are another's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fp8lm.checkpoint import latest_iteration
from fp8lm.comm.groups import process_groups
from fp8lm.runtime.errors import LockLost, run_command
from fp8lm.runtime.holder import this_process
from fp8lm.runtime.lock_file import NAME
from fp8lm.runtime.run_lock import RunLocks
from fp8lm.training.build import build
from fp8lm.training.hooks import build_trainer
from fp8lm.training.run_folders import locked_folders, run_folders
from tests.training.runs import trainer_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def steal(folder):
    """Give the folder to a run of another host."""
    (folder / NAME).unlink()
    thief = this_process({}).model_copy(update={"host": "elsewhere"})
    (folder / NAME).write_bytes(thief.to_bytes())


def contents(folder):
    """Every file, without what a stopped writer may leave."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


class Stolen(RunLocks):
    """Locks that another run takes before they are looked at for the `after`-th time."""

    def __init__(self, folder, after):
        super().__init__()
        self.folder, self.left, self.before = folder, after, None

    def verify(self):
        self.left -= 1
        if self.left == 0:
            steal(self.folder)
            self.before = contents(self.folder)
        super().verify()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("after", [1, 2, 4, 5, 6, 7, 8, 9, 14])
def test_a_run_whose_folder_is_taken_over_stops_and_writes_no_more(
    after, asynchronous, tiny_config, folders, tmp_path
):
    checkpoint = {"save_interval": 2, "async_save": asynchronous, "keep_last": 1}
    config = tiny_config(folders("run"), {"train": {"eval_iters": 0}, "checkpoint": checkpoint})
    folder = tmp_path / "run"
    locks = Stolen(folder, after)
    with process_groups(torch.device("cpu")) as groups:
        run = build(config, groups, torch.device("cpu"))
        locks.take(run_folders(config))
        with pytest.raises(LockLost, match="elsewhere"):
            trainer = build_trainer(run, locks)
            trainer.load()
            trainer.train()
        locks.release()
    assert locks.before is not None and contents(folder) == locks.before
    assert (folder / NAME).exists()


def lose(config, folder, rank):
    """Train on all ranks until the folder is stolen; how this rank ends, and where."""
    with trainer_of(config) as trainer, locked_folders(config, trainer.run.groups) as locks:
        trainer = build_trainer(trainer.run, locks)
        trainer.load()
        tell, calls = trainer.checkpoints.tell, []

        def tell_and_steal():
            calls.append(None)
            if len(calls) == 3 and trainer.run.groups.world.rank() == rank:
                steal(folder)
            tell()

        trainer.checkpoints.tell = tell_and_steal
        try:
            trainer.train()
        except LockLost:
            return trainer.progress.iteration
    return None


def test_all_ranks_stop_after_the_same_step(tiny_config, run_distributed, folders, tmp_path):
    config = tiny_config(folders("run"), {"train": {"eval_iters": 0, "train_iters": 50}})
    ends = run_distributed(lose, 2, config, tmp_path / "run", 0)
    assert ends[0] == ends[1] and 3 <= ends[0] <= 6


def test_what_a_run_writes_alone(tiny_config):
    def keys(**logging):
        return [folder.key for folder in run_folders(tiny_config({"logging": logging}))]

    assert keys() == []
    assert keys(dir="a", wandb_project="p", wandb_save_dir="shared") == ["logging.dir=a"]
    assert keys(wandb_project="p", wandb_save_dir="b") == ["logging.wandb_save_dir=b"]
    assert keys(wandb_save_dir="b") == []


def command(*arguments):
    small = ["model.num_layers=2", "train.eval_iters=0", "train.num_threads=1"]
    return ["--config", str(ROOT / "configs/gpt_tiny.yaml"), *small, *arguments]


def test_two_jobs_and_a_killed_one(tmp_path, capfd):
    """One folder for both is refused, naming the first; the first's death frees it at once."""
    from pretrain_gpt import main

    keys = [f"checkpoint.{key}={tmp_path}/ck" for key in ("save", "load")]
    keys += ["checkpoint.save_interval=1", f"logging.dir={tmp_path}/log"]
    script = [sys.executable, str(ROOT / "pretrain_gpt.py"), *command("train.train_iters=9999")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(script + keys, stdout=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 100
        while latest_iteration(tmp_path / "ck") is None and time.monotonic() < deadline:
            time.sleep(0.1)
        for key in (keys[0], keys[-1]):
            assert run_command(main, command("train.train_iters=2", key)) == 2
            (line,) = capfd.readouterr().err.splitlines()
            assert key in line and f"process {first.pid} " in line
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    saved = latest_iteration(tmp_path / "ck")
    assert saved is not None and (tmp_path / "ck" / NAME).exists()
    started = time.monotonic()
    assert run_command(main, command(f"train.train_iters={saved + 1}", *keys)) == 0
    assert time.monotonic() - started < 30
    assert not (tmp_path / "ck" / NAME).exists() and not (tmp_path / "log" / NAME).exists()
    lines = (tmp_path / "log" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, saved]
