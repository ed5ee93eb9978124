"""Output that cannot be written: given up, said, and never the end of a training."""

from __future__ import annotations

import errno
import io
import os
import sys
import time

import pytest

from fp8lm.checkpoint import latest_iteration
from fp8lm.metrics.console import Console
from fp8lm.runtime.errors import run_command
from fp8lm.runtime.streams import BestEffortStream, warn


@pytest.fixture
def full():
    with open("/dev/full", "w") as stream:
        yield stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@pytest.fixture
def pipe():
    """The two ends of a pipe, as a file and a text stream."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as reader, os.fdopen(write, "w") as stream:
        yield reader, stream


def test_a_full_disk_loses_text_and_says_why(full):
    lost = []
    stream = BestEffortStream(full, lambda *given: lost.append(given))
    print("first", file=stream)
    print("second", file=stream, flush=True)
    assert lost[0] == ("first", os.strerror(errno.ENOSPC)) and len(lost) == 4


def test_a_reader_that_left_is_no_failure(pipe):
    reader, stream = pipe
    reader.close()
    lost = []
    BestEffortStream(stream, lambda *given: lost.append(given)).write("x\n")
    assert lost == [("x\n", os.strerror(errno.EPIPE))]


def test_a_reader_that_stopped_is_waited_for_once_and_may_go_on(pipe):
    reader, stream = pipe
    lost = []
    output = BestEffortStream(stream, lambda *given: lost.append(given), wait=0.5)
    page = "x" * 4096
    started = time.monotonic()
    while len(lost) < 20:
        output.write(page)
    assert 0.5 <= time.monotonic() - started < 5.0
    os.set_blocking(reader.fileno(), False)
    while reader.read(1 << 20):
        pass
    output.write("goes on\n")
    assert reader.read(1 << 20) == b"goes on\n" and len(lost) == 20


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_streams_that_are_closed(stream):
    if stream is not None:
        stream.close()
    lost = []
    output = BestEffortStream(stream, lambda *given: lost.append(given))
    assert not output.isatty()
    output.write("x")
    assert len(lost) == 1


def test_text_that_the_terminal_has_no_letters_for(pipe):
    reader, stream = pipe
    stream.reconfigure(encoding="ascii")
    BestEffortStream(stream).write("\N{GREEK SMALL LETTER MU}\n")
    assert reader.read(99) == b"\\u03bc\n"


def test_a_dead_terminal_under_the_progress_bar(tmp_path, capsys):
    class Dead(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    console = Console(9, stream=Dead(), aside=tmp_path / "lines")
    console.write("one")
    console.advance()
    console.rewind(0)
    console.write("two")
    console.close()
    warning, *lines = (tmp_path / "lines").read_text().splitlines()
    assert lines == ["one", "two"] and warning in capsys.readouterr().err.splitlines()


def test_warnings_to_a_full_disk(full, monkeypatch):
    monkeypatch.setattr(sys, "stderr", full)
    warn("nobody hears this")


def test_a_training_outlives_its_output(full, tiny_config, train_run, tmp_path, monkeypatch):
    config = tiny_config(
        {"checkpoint": {"save": str(tmp_path / "ck")}, "logging": {"dir": str(tmp_path / "log")}}
    )
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", full)
    assert run_command(lambda argv: train_run(config) and 0, []) == 0
    assert latest_iteration(tmp_path / "ck") == 8
    lines = (tmp_path / "log" / "unwritten.log").read_text()
    assert lines.startswith(" warning: stdout takes no more") and "saved checkpoint" in lines
