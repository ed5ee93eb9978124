"""Signals and the end of time: all ranks stop after the same step, save, and ask for a restart."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch.distributed as dist

from fp8lm.checkpoint import latest_iteration
from fp8lm.comm.env import DistEnv
from fp8lm.config import CheckpointConfig, TrainConfig
from fp8lm.runtime.errors import EXIT_INTERRUPTED, EXIT_RESTART, run_command
from fp8lm.training.stopping import (
    TIME_IS_OVER,
    StopRequests,
    command_to_go_on,
    describe,
    exit_code,
    is_over,
    job_started,
)
from tests.training.runs import BeforeStep, curve, trainer_of

pytestmark = pytest.mark.slow

SIZES = {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heard_inside_and_not_after(number):
    former = signal.getsignal(number)
    with StopRequests(TrainConfig(**SIZES), DistEnv()) as requests:
        assert requests.reason == 0.0
        os.kill(os.getpid(), number)
        assert requests.reason == float(number)
        assert describe(requests.reason) == f"received {number.name}"
    assert signal.getsignal(number) is former


def test_signals_can_be_left_to_others():
    former = signal.getsignal(signal.SIGTERM)
    with StopRequests(TrainConfig(**SIZES, exit_signal_handler=False), DistEnv()):
        assert signal.getsignal(signal.SIGTERM) is former


def test_time_counts_from_the_start_of_the_job():
    age = (time.time() - job_started(DistEnv())) / 60.0
    assert StopRequests(TrainConfig(**SIZES, exit_duration_in_mins=age + 1), DistEnv()).reason == 0
    over = StopRequests(TrainConfig(**SIZES, exit_duration_in_mins=max(age / 2, 1e-9)), DistEnv())
    assert over.reason == TIME_IS_OVER
    assert describe(over.reason) == "train.exit_duration_in_mins is over"
    # A launcher may have restarted this process: the job is as old as the launcher.
    assert job_started(DistEnv(by_launcher=True)) <= job_started(DistEnv())


def test_a_restart_after_the_end_of_time_does_not_train():
    config = TrainConfig(**SIZES, exit_duration_in_mins=1e-9)
    assert is_over(config, DistEnv(by_launcher=True, restart=1))
    assert not is_over(config, DistEnv(by_launcher=True))  # the first start gets its first step
    assert not is_over(TrainConfig(**SIZES), DistEnv(by_launcher=True, restart=1))


@pytest.mark.parametrize(
    ("reason", "resumes", "code"),
    [
        (signal.SIGTERM, True, EXIT_RESTART),
        (TIME_IS_OVER, True, EXIT_RESTART),
        (signal.SIGTERM, False, 143),
        (signal.SIGUSR1, False, 138),
        (TIME_IS_OVER, False, 0),
    ],
)
def test_only_what_resumes_asks_for_a_restart(reason, resumes, code):
    assert exit_code(float(reason), resumes) == code


def train_and_kill(config, rank, iteration, number):
    """The exit code and the last iteration of this rank; `rank` gets the signal."""
    with trainer_of(config) as trainer:

        def kill(trainer):
            if trainer.progress.iteration + 1 == iteration and dist.get_rank() == rank:
                os.kill(os.getpid(), number)

        trainer.hooks.append(BeforeStep(kill))
        return trainer.train(), trainer.progress.iteration


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    number, asynchronous, tiny_config, run_distributed, folders, tmp_path
):
    def of(run):
        return tiny_config(folders(run), {"checkpoint": {"async_save": asynchronous}})

    # In the second half of a report's interval, so that its average lies in the checkpoint.
    assert run_distributed(train_and_kill, 2, of("whole"), 1, 99, number) == [(0, 8)] * 2
    assert run_distributed(train_and_kill, 2, of("parts"), 1, 5, number) == [(EXIT_RESTART, 5)] * 2
    assert latest_iteration(tmp_path / "parts") == 5
    assert run_distributed(train_and_kill, 2, of("parts"), 1, 99, number) == [(0, 8)] * 2
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_signal_in_the_last_step_changes_nothing(tiny_config, run_distributed):
    assert run_distributed(train_and_kill, 2, tiny_config(), 0, 8, signal.SIGTERM) == [(0, 8)] * 2


def test_a_signal_with_nothing_saved_does_not_promise_to_go_on(tiny_config, run_distributed):
    ends = run_distributed(train_and_kill, 2, tiny_config(), 0, 5, signal.SIGTERM)
    assert ends == [(143, 5)] * 2


def test_a_signal_to_a_run_that_would_start_from_elsewhere(tiny_config, run_distributed, tmp_path):
    config = tiny_config({"checkpoint": {"save": str(tmp_path)}})
    assert run_distributed(train_and_kill, 2, config, 0, 5, signal.SIGTERM) == [(143, 5)] * 2
    assert latest_iteration(tmp_path) == 5


def test_the_end_of_time(tiny_config, run_distributed, tmp_path):
    config = tiny_config(
        {
            "checkpoint": {"save": str(tmp_path), "load": str(tmp_path)},
            "train": {"exit_duration_in_mins": 1e-6},
        }
    )
    assert run_distributed(train_and_kill, 2, config, 0, 99, 0) == [(EXIT_RESTART, 1)] * 2
    assert latest_iteration(tmp_path) == 1


def interrupt_at(iteration):
    """For `train_run`: Ctrl-C before step `iteration`."""

    def interrupt(trainer):
        if trainer.progress.iteration + 1 == iteration:
            raise KeyboardInterrupt

    return lambda trainer: trainer.hooks.append(BeforeStep(interrupt))


def test_ctrl_c_says_what_there_is_and_how_to_go_on(tiny_config, train_run, tmp_path, capsys):
    folder = str(tmp_path / "ck")
    config = tiny_config({"checkpoint": {"save": folder, "save_interval": 4}})
    assert run_command(lambda argv: train_run(config, interrupt_at(7)), []) == EXIT_INTERRUPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted: after iteration 6; ") and "iteration 4" in line
    assert f"in {folder} (2 iterations lost)" in line
    assert line.endswith(f" checkpoint.load={folder}")


def test_ctrl_c_with_nothing_saved(tiny_config, train_run, tmp_path, capsys):
    run_command(lambda argv: train_run(tiny_config(), interrupt_at(3)), [])
    assert "nothing is saved without checkpoint.save" in capsys.readouterr().err
    config = tiny_config({"checkpoint": {"save": str(tmp_path / "ck")}})
    run_command(lambda argv: train_run(config, interrupt_at(3)), [])
    assert "after iteration 2; there is no checkpoint in" in capsys.readouterr().err


def test_the_command_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "a b"])
    resumes = CheckpointConfig(save=str(tmp_path), load=str(tmp_path))
    assert command_to_go_on(resumes, DistEnv()) == "python train.py 'a b'"
    assert command_to_go_on(resumes, DistEnv(by_launcher=True)) == "the same command"
    other = CheckpointConfig(save=str(tmp_path))
    more = f"checkpoint.load={tmp_path}"
    assert command_to_go_on(other, DistEnv()) == f"python train.py 'a b' {more}"
    assert command_to_go_on(other, DistEnv(by_launcher=True)) == f"the same command with {more}"


def test_a_lost_terminal_stops_a_run_unless_nohup_says_otherwise():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests(TrainConfig(**SIZES), DistEnv()) as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.reason == 0.0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequests(TrainConfig(**SIZES), DistEnv()) as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.reason == float(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)
