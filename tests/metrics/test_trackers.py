"""Trackers never stop a run; TensorBoard across resumes."""

from __future__ import annotations

import io
import json

import pytest

from fp8lm.config import LoggingConfig
from fp8lm.metrics.logger import RunInfo, TrainLogger
from fp8lm.metrics.tensorboard_file import TensorBoard
from fp8lm.metrics.trackers import BestEffortTracker
from tests.checkpoint.tensors import file_size_limit
from tests.metrics.reports import VALUES


def log(folder, iterations, first=0, evaluate=False, **info):
    config = LoggingConfig(dir=str(folder))
    with TrainLogger(config, RunInfo(1000, first, **info), io.StringIO()) as logger:
        if evaluate:
            logger.log_validation(first, 3.0)
        for iteration in iterations:
            logger.log_step({**VALUES, "iteration": iteration})


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def steps(folder, key="lm loss"):
    return [event.step for event in events(folder).Scalars(key)]


def test_tensorboard_hides_what_is_done_again(tmp_path):
    log(tmp_path, [10, 20, 30])
    log(tmp_path, [30, 40], first=20)
    assert steps(tmp_path) == [10, 20, 30, 40]
    assert events(tmp_path).Scalars("learning-rate")[0].value == pytest.approx(1e-4)


def test_a_rollback_hides_what_it_does_again(tmp_path):
    with TrainLogger(LoggingConfig(dir=str(tmp_path)), RunInfo(99), io.StringIO()) as logger:
        for iteration in (10, 20, 30):
            logger.log_step({**VALUES, "iteration": iteration, "lm loss": 9.0})
        logger.rewind(10)
        logger.log_step({**VALUES, "iteration": 20, "lm loss": 2.0})
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("lm loss")] == [
        (10, 9.0),
        (20, 2.0),
    ]


def test_a_training_from_the_beginning_hides_all_of_the_former(tmp_path):
    log(tmp_path, [10, 20], evaluate=True)
    log(tmp_path, [10], evaluate=True)
    assert steps(tmp_path) == [10]
    assert steps(tmp_path, "lm loss validation") == [0]


def test_a_resume_keeps_the_evaluation_at_its_checkpoint(tmp_path):
    log(tmp_path, [10, 20], evaluate=True)
    with TrainLogger(LoggingConfig(dir=str(tmp_path)), RunInfo(99), io.StringIO()) as logger:
        logger.log_step({**VALUES, "iteration": 20})
        logger.log_validation(20, 2.0)
    log(tmp_path, [30], first=20)
    assert steps(tmp_path, "lm loss validation") == [20]


def test_tensorboard_keeps_config_and_facts_as_text(tmp_path):
    facts = {"git": {"commit": "0123abc", "dirty": True}}
    log(tmp_path, [1], config={"train": {"seed": 7}}, facts=facts)
    tensors = events(tmp_path)
    texts = {
        tag: tensors.Tensors(tag)[0].tensor_proto.string_val for tag in tensors.Tags()["tensors"]
    }
    assert texts["config/text_summary"] == [b"    train:\n      seed: 7\n"]
    assert texts["facts/text_summary"] == [b"    git:\n      commit: 0123abc\n      dirty: true\n"]


def test_tensorboard_that_cannot_start_is_one_warning(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log(tmp_path, [1, 2, 3])
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("warning: going on without TensorBoard") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_full_disk_is_one_warning_each_and_metrics_wait_for_space(tmp_path, capsys):
    stream = io.StringIO()
    with TrainLogger(LoggingConfig(dir=str(tmp_path)), RunInfo(1000), stream) as logger:
        with file_size_limit(2000):
            for iteration in range(1, 41):
                logger.log_step({**VALUES, "iteration": iteration})
        logger.log_step({**VALUES, "iteration": 41})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert f"{tmp_path / 'metrics.jsonl'} waits for space" in "".join(warnings)
    assert "going on without TensorBoard" in "".join(warnings)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 42))
    assert stream.getvalue().count("iteration  ") == 41
    assert steps(tmp_path) == list(range(1, len(steps(tmp_path)) + 1))


class Failing:
    """Fails in the method named, and counts its calls."""

    def __init__(self, method):
        self.method, self.calls = method, []
        self._call("start")

    def log(self, values, iteration):
        self._call("log")

    def rewind(self, iteration):
        self._call("go back")

    def close(self, failed):
        self._call("close")

    def _call(self, method):
        self.calls.append(method)
        if method == self.method:
            raise RuntimeError("a token-free\nreason")


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("start", ["start"]),
        ("log", ["start", "log"]),
        ("go back", ["start", "log", "go back"]),
        ("close", ["start", "log", "go back", "log", "close"]),
    ],
)
def test_the_first_failure_is_the_last_word(method, calls, capsys):
    made = []

    def start():
        made.append(Failing.__new__(Failing))
        made[0].__init__(method)
        return made[0]

    tracker = BestEffortTracker("x", start)
    tracker.log({}, 1)
    tracker.rewind(0)
    tracker.log({}, 2)
    tracker.close(failed=False)
    assert made[0].calls == calls
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "going on without x" in error and "reason" in error


def test_interrupting_is_not_a_failure():
    def start():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BestEffortTracker("x", start)


def test_tensorboard_raises_where_it_fails(tmp_path):
    board = TensorBoard(tmp_path, 0, {})
    with file_size_limit(10), pytest.raises(OSError):
        board.log({"x": 1.0}, 1)
