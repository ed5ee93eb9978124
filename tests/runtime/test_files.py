"""Files are written whole, never through a planted link, and only regular ones are read."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from fp8lm.checkpoint import Shard, claim_save_dir, save_checkpoint
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.metrics.metrics_file import MetricsFile
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import (
    NotRegular,
    open_regular,
    open_to_append,
    read_regular,
    remove_unfinished,
    write_whole,
)
from fp8lm.training.run_start import record_start

TINY = Path(__file__).parents[2] / "configs" / "gpt_tiny.yaml"
SECRET = "what somebody else has written\n"


@pytest.fixture
def victim(tmp_path):
    """A file that nothing may change; checked at the end."""
    path = tmp_path / "victim.txt"
    path.write_text(SECRET)
    yield path
    assert path.read_text() == SECRET


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def test_a_file_is_replaced_and_nothing_stays_beside_it(place):
    path = place / "a.txt"
    for data in ("one\n", b"two\n"):
        write_whole(path, data)
    assert path.read_text() == "two\n" and os.listdir(place) == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(place, monkeypatch, failing):
    path = place / "a.txt"
    write_whole(path, "one\n")

    def fail(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="quota"):
            write_whole(path, "two\n")
    assert path.read_text() == "one\n" and os.listdir(place) == ["a.txt"]


def test_what_killed_writers_left_is_removed(place):
    (place / ".a.txt.0123.tmp").write_text("half")
    (place / ".b.txt.0123.tmp").write_text("of another")
    remove_unfinished(place / "a.txt")
    assert os.listdir(place) == [".b.txt.0123.tmp"]


def test_a_link_is_replaced_and_not_followed(place, victim):
    (place / "a.txt").symlink_to(victim)
    write_whole(place / "a.txt", "new\n")
    assert not (place / "a.txt").is_symlink()


def special(path, kind, victim):
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "device"])
@pytest.mark.parametrize(
    "use",
    [open_regular, open_to_append, lambda path: read_regular(path, 10)],
    ids=["open", "append", "read"],
)
def test_only_regular_files_are_opened(place, victim, kind, use):
    special(place / "x", kind, victim)
    with pytest.raises(NotRegular, match="x is"):
        use(place / "x")


def test_a_device_is_not_replaced():
    with pytest.raises(NotRegular):
        write_whole("/dev/null", "x")


def test_sizes_are_bounded(place):
    (place / "x").write_bytes(bytes(11))
    assert len(read_regular(place / "x", 11)) == 11
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_regular(place / "x", 10)


def test_output_into_a_pipe(place):
    os.mkfifo(place / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((place / "pipe").read_bytes()))
    reader.start()
    write_aside(place / "pipe", "text")
    reader.join()
    assert read == [b"text"] and stat.S_ISFIFO((place / "pipe").stat().st_mode)


# Names at which the program writes, and those at which earlier versions wrote aside.
METRICS = ("metrics.jsonl", ".metrics.jsonl.tmp")
CONFIG = ("config.yaml", ".config.yaml.{pid}.tmp")
LATEST = "latest_checkpointed_iteration.txt"
SAVE = (LATEST, f".{LATEST}.tmp", ".iter_0000007.tmp", ".iter_0000007.old", "iter_0000007")


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("iteration", [0, 5])
def test_metrics_do_not_follow_a_planted_link(place, victim, name, iteration):
    (place / name).symlink_to(victim)
    try:
        metrics = MetricsFile(place, iteration)
    except InputError as error:
        assert "metrics.jsonl is a symbolic link" in str(error)
        return
    metrics.write({"iteration": 6})
    metrics.rewind(5)
    metrics.close()


def test_starts_do_not_follow_a_planted_link(place, victim):
    (place / "starts.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        record_start(place, {}, 0, 1)


@pytest.mark.parametrize("name", CONFIG)
def test_the_config_does_not_follow_a_planted_link(place, victim, name):
    (place / name.format(pid=os.getpid())).symlink_to(victim)
    load_config(TINY).save_yaml(place / "config.yaml")
    assert (place / "config.yaml").is_file()


@pytest.mark.parametrize("name", SAVE)
@pytest.mark.parametrize("to_folder", [False, True], ids=["file", "folder"])
def test_a_save_does_not_follow_a_planted_link(place, victim, name, to_folder):
    home = victim.parent / "home"
    home.mkdir()
    (home / "mine.txt").write_text(SECRET)
    (place / name).symlink_to(home if to_folder else victim)
    for _ in range(2):
        save_checkpoint(place, 7, {"w": [Shard.whole(torch.zeros(2))]}, {})
    assert os.listdir(home) == ["mine.txt"]
    assert not (place / LATEST).is_symlink() and not (place / "iter_0000007").is_symlink()


def test_checkpoints_are_not_set_aside_through_a_link(place, victim):
    save_checkpoint(place, 7, {"w": [Shard.whole(torch.zeros(2))]}, {})
    (place / "set_aside").symlink_to(victim.parent)
    with pytest.raises(InputError, match="symbolic link"):
        claim_save_dir(place, 0, own=True)
    assert (place / "iter_0000007").is_dir()
