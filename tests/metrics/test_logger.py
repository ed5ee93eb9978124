"""Reports: Megatron's lines, metrics.jsonl across resumes and on a full disk."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import time
from datetime import datetime

import pytest

from fp8lm.config import LoggingConfig
from fp8lm.metrics.console import evaluation_line, saved_line, training_line
from fp8lm.metrics.logger import RunInfo, TrainLogger
from fp8lm.metrics.metrics_file import MetricsFile
from fp8lm.runtime.errors import InputError
from tests.checkpoint.tensors import file_size_limit
from tests.metrics import reports

VALUES = {"iteration": 100, **reports.VALUES, "state_bytes/weights": 123456789012}


def config(folder=None, **keys):
    keys = {"tensorboard": False, **keys}
    return LoggingConfig(dir=str(folder) if folder else None, log_interval=10, **keys)


def log(folder, iterations, first=0, **keys):
    with TrainLogger(config(folder, **keys), RunInfo(1000, first), io.StringIO()) as logger:
        for iteration in iterations:
            logger.log_step({**VALUES, "iteration": iteration})


def read(folder):
    """What was reported, without the time of it, which is that of this test."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(time.time() - 60 < line.pop("timestamp") <= time.time() for line in lines)
    return lines


def test_training_line():
    assert training_line(VALUES, 1000, datetime(2026, 11, 23, 10)) == (
        " [2026-11-23 10:00:00] iteration      100/    1000 | consumed samples:  25600 | "
        "elapsed time per iteration (ms): 812.3 | throughput per GPU (TFLOP/s/GPU): 612.0 | "
        "learning rate: 1.0000E-04 | global batch size:   256 | lm loss: 3.1415E+00 | "
        "grad norm: 0.512 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [(612.03, "612.0"), (1.25, "1.25"), (0.000123456, "0.000123"), (0.0, "0.0")],
)
def test_a_small_throughput_keeps_three_digits(value, shown):
    line = training_line({**VALUES, "throughput": value}, 1000)
    assert f"(TFLOP/s/GPU): {shown} |" in line


def test_other_lines():
    assert evaluation_line("validation", 100, math.log(24)) == (
        " validation loss at iteration 100 | lm loss value: 3.1781E+00 | lm loss PPL: 2.4000E+01 |"
    )
    assert evaluation_line("test", 7, 1e4).endswith("PPL: 4.8517E+08 |")  # e^20, no overflow
    assert saved_line(100, "DIR") == "  successfully saved checkpoint from iteration 100 to DIR"


def test_stdout_without_a_terminal(capsys):
    with TrainLogger(config(), RunInfo(1000)) as logger:
        logger.advance()
        logger.log_step(VALUES)
        logger.log_validation(100, 3.0)
        logger.log_text(saved_line(100, "runs/x"))
    captured = capsys.readouterr()
    assert [line.split(" |")[0] for line in captured.out.splitlines()][1:] == [
        " validation loss at iteration 100",
        "  successfully saved checkpoint from iteration 100 to runs/x",
    ]
    assert "%" not in captured.out + captured.err


def test_progress_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with TrainLogger(config(), RunInfo(1000, first_iteration=250), terminal) as logger:
        logger.advance()
        logger.log_validation(100, 3.0)
    assert "250/1000" in terminal.getvalue()
    # The line stands alone: the bar is cleared before it and drawn again after it.
    assert re.search(r"\r validation loss .*\|\n", terminal.getvalue())


def test_other_processes_are_silent(tmp_path, capsys):
    logger = TrainLogger(
        config(tmp_path / "run", tensorboard=True, wandb_project="x"), RunInfo(9, is_main=False)
    )
    logger.advance()
    logger.log_step(VALUES)
    logger.log_validation(1, 2.0)
    logger.log_text("x")
    logger.close()
    captured = capsys.readouterr()
    assert captured.out + captured.err == "" and not (tmp_path / "run").exists()


def test_metrics_keep_every_digit_and_every_key(tmp_path):
    loss = 3.141592653589793
    with TrainLogger(config(tmp_path), RunInfo(1000), io.StringIO()) as logger:
        logger.log_step({**VALUES, "lm loss": loss, "comm_bytes/grads": 7})
        assert read(tmp_path) == [{**VALUES, "lm loss": loss, "comm_bytes/grads": 7}]
        logger.log_validation(100, loss)
        assert read(tmp_path)[1] == {"iteration": 100, "lm loss validation": loss}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_stay_json(tmp_path, value):
    with TrainLogger(config(tmp_path), RunInfo(1000), io.StringIO()) as logger:
        logger.log_step({**VALUES, "lm loss": value})
    (line,) = read(tmp_path)
    assert line["lm loss"] is None and line["grad-norm"] == 0.5117


def test_resume_cuts_later_iterations(tmp_path):
    log(tmp_path, [10, 20, 30, 40])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5')  # a process killed while it wrote
    log(tmp_path, [30, 40], first=25)
    assert [line["iteration"] for line in read(tmp_path)] == [10, 20, 30, 40]
    log(tmp_path, [50], first=40)
    assert [line["iteration"] for line in read(tmp_path)] == [10, 20, 30, 40, 50]
    log(tmp_path, [10])
    assert [line["iteration"] for line in read(tmp_path)] == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_is_removed_is_made_anew(tmp_path, capsys):
    metrics = MetricsFile(tmp_path / "log", 0)
    metrics.write({"iteration": 1})
    shutil.rmtree(tmp_path / "log")
    metrics.write({"iteration": 2})
    metrics.write({"iteration": 3})
    metrics.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl" in line
    lines = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [2, 3]


def test_lines_that_wait_are_not_written_to_a_folder_that_is_anothers(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    with file_size_limit(0):  # as on a full disk
        metrics.write({"iteration": 1})
    metrics.close(may_write=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to logging\.dir"):
        TrainLogger(config(tmp_path / "file"), RunInfo(1))
