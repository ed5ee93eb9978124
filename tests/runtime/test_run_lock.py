"""One run at a time in a folder, whatever has become of the one before, on one host or several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Event

import pytest

from fp8lm.runtime.errors import FolderInUse, FolderInUseElsewhere, InputError, LockLost
from fp8lm.runtime.hold import main as hold
from fp8lm.runtime.holder import this_process
from fp8lm.runtime.lock_file import NAME
from fp8lm.runtime.run_lock import RunFolder, RunLocks, Timing, running_here

TIMING = Timing(heartbeat=3600, patience=60, settle=0.1, poll=1)
ELSEWHERE = {"host": "elsewhere", "boot_id": "of elsewhere"}
SLURM = {"SLURM_JOB_ID": "42"}


class Clock:
    """A clock that sleeping moves on; `then` is called after each sleep with the time."""

    def __init__(self, then=lambda now: None):
        self.now, self.then = 0.0, then

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.then(self.now)


class Party:
    """A process of some host that wants `folder`."""

    def __init__(self, folder, then=lambda now: None, environment=None, **changes):
        self.clock, self.lines = Clock(then), []
        here = this_process(environment or {}, ["train.py"])
        self.here = here.model_copy(update=changes)
        self.folder = RunFolder(
            str(folder), f"checkpoint.save={folder}", f"cannot save in {folder}"
        )
        self.locks = RunLocks(self.here, TIMING, self.clock, self.lines.append)

    def take(self):
        self.locks.take([self.folder])
        return self


@pytest.fixture
def gone():
    """What identifies a process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return {"pid": child.pid, "process_start": "1"}


def test_a_lock_is_there_while_it_is_held_and_says_who_holds_it(tmp_path):
    party = Party(tmp_path / "a/b").take()
    record = json.loads((tmp_path / "a/b" / NAME).read_text())
    assert record["pid"] == os.getpid() and record["host"] == party.here.host
    assert record["command"] == "train.py" and record["token"] == party.here.token
    party.locks.verify()
    party.locks.release()
    assert not list(tmp_path.iterdir())  # the folders were made for it


def test_a_second_run_of_this_host_is_refused_at_once_and_told_who_holds_it(tmp_path):
    first, second = Party(tmp_path).take(), Party(tmp_path)
    with pytest.raises(FolderInUse) as refusal:
        second.take()
    assert type(refusal.value).exit_code == 2 and second.clock.now == 0
    for text in (f"process {os.getpid()} on {first.here.host}", first.here.since, "train.py"):
        assert text in str(refusal.value)
    first.locks.verify()
    first.locks.release()
    second.take().locks.release()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pid": os.getpid()},  # another process has the number now
        {"boot_id": "before", "machine_id": "m", "pid_namespace": "pid:[4026531836]"},
    ],
    ids=["ended", "reused pid", "rebooted"],
)
def test_a_dead_process_of_this_host_frees_its_lock_at_once(tmp_path, gone, changes):
    Party(tmp_path, **gone | changes).take()
    here = {key: changes[key] for key in ("machine_id", "pid_namespace") if key in changes}
    second = Party(tmp_path, **here).take()
    assert second.clock.now < 1 and not second.lines
    second.locks.verify()
    second.locks.release()
    assert not list(tmp_path.iterdir())


def test_a_zombie_process_is_dead(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    child.stdout.read()
    deadline = time.monotonic() + 10
    start = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    while "Z" not in Path(f"/proc/{child.pid}/stat").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    Party(tmp_path, pid=child.pid, process_start=start).take()
    second = Party(tmp_path).take()
    assert second.clock.now < 1
    child.wait()


def test_a_stopped_process_of_this_host_keeps_its_lock(tmp_path):
    """However long it is silent: it may go on any moment."""
    Party(tmp_path, environment=SLURM).take()
    with pytest.raises(FolderInUse):
        Party(tmp_path).take()
    requeued = Party(tmp_path, environment=SLURM)
    with pytest.raises(FolderInUseElsewhere):
        requeued.take()
    assert requeued.clock.now >= TIMING.patience


def test_the_same_job_waits_for_its_former_process_to_end(tmp_path):
    """As a requeued job does, whose process is just being killed."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    Party(tmp_path, environment=SLURM, pid=child.pid, process_start=start).take()

    def end(now):
        if now >= 3 and child.poll() is None:
            child.communicate(b"\n")

    second = Party(tmp_path, end, SLURM).take()
    assert 3 <= second.clock.now < 10


def test_from_another_host_a_living_run_is_seen_by_its_heartbeat(tmp_path):
    first = Party(tmp_path, **ELSEWHERE).take()
    second = Party(tmp_path, lambda now: now >= 10 and first.locks.heartbeat())
    with pytest.raises(FolderInUseElsewhere) as refusal:
        second.take()
    assert type(refusal.value).exit_code == 75 and 10 <= second.clock.now < 15
    assert "on elsewhere since" in str(refusal.value)
    assert len(second.lines) == 1 and "elsewhere" in second.lines[0]
    first.locks.verify()


def test_from_another_host_a_silent_run_is_waited_for_and_taken_over(tmp_path):
    first = Party(tmp_path, **ELSEWHERE).take()
    second = Party(tmp_path).take()
    assert TIMING.patience <= second.clock.now < TIMING.patience + 5
    second.locks.verify()
    # It was suspended, and wakes up.
    first.locks.heartbeat()
    assert json.loads((tmp_path / NAME).read_text())["token"] == second.here.token
    assert first.locks.lost and not first.locks.held()
    with pytest.raises(LockLost) as lost:
        first.locks.verify()
    assert type(lost.value).exit_code == 2 and str(os.getpid()) in str(lost.value)
    first.locks.release()
    second.locks.verify()
    second.locks.heartbeat()
    assert not second.locks.lost


@pytest.mark.parametrize("namespace", ["pid:[1]", ""])
def test_another_container_is_another_host(tmp_path, namespace):
    """Its process has a number that means another one here, or none."""
    Party(tmp_path, pid_namespace=namespace).take()
    second = Party(tmp_path, pid_namespace=namespace if namespace == "" else "pid:[2]").take()
    assert second.clock.now >= TIMING.patience


def test_a_replaced_container_of_the_same_name_may_still_run(tmp_path):
    container = {"pid_namespace": "pid:[1]", "machine_id": "of the image"}
    Party(tmp_path, boot_id="of another machine", **container).take()
    assert Party(tmp_path, **container).take().clock.now >= TIMING.patience


def test_a_rival_that_is_a_moment_quicker_wins(tmp_path, gone):
    """It found the former lock stale as well, and has moved the new one out of its way."""
    rival = Party(tmp_path)

    def come_first(_):
        (tmp_path / NAME).unlink()
        rival.take()

    Party(tmp_path, **gone).take()
    second = Party(tmp_path, come_first)
    with pytest.raises(FolderInUse):
        second.take()
    rival.locks.verify()


def test_a_lock_that_goes_while_it_is_watched_is_free(tmp_path):
    first = Party(tmp_path, **ELSEWHERE).take()
    second = Party(tmp_path, lambda now: now >= 5 and first.locks.release()).take()
    assert second.clock.now < 10
    second.locks.verify()


def test_a_heartbeat_in_the_last_moment_counts(tmp_path, monkeypatch):
    first = Party(tmp_path, **ELSEWHERE).take()
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (first.locks.heartbeat(), rename(*paths)))
    with pytest.raises(FolderInUseElsewhere):
        Party(tmp_path).take()
    first.locks.verify()


def test_a_lock_removed_by_hand_is_made_again(tmp_path):
    party = Party(tmp_path).take()
    for check in (party.locks.heartbeat, party.locks.verify):
        (tmp_path / NAME).unlink()
        check()
        assert json.loads((tmp_path / NAME).read_text())["token"] == party.here.token
    assert not party.locks.lost


@pytest.mark.parametrize("act", ["heartbeat", "verify"])
def test_a_run_that_wakes_up_when_its_successor_has_ended(tmp_path, act):
    first = Party(tmp_path, **ELSEWHERE).take()
    second = Party(tmp_path).take()
    second.locks.release()
    assert not (tmp_path / NAME).exists()
    first.clock.sleep(second.clock.now)
    with pytest.raises(LockLost):
        getattr(first.locks, act)()
        first.locks.verify()
    assert first.locks.lost and not (tmp_path / NAME).exists()


def test_heartbeats_count_from_the_last_one(tmp_path):
    party = Party(tmp_path).take()
    for _ in range(5):
        party.clock.sleep(50)
        party.locks.heartbeat()
    (tmp_path / NAME).unlink()
    party.locks.verify()
    assert (tmp_path / NAME).exists()


def test_a_folder_that_is_gone_is_nobody_elses(tmp_path):
    party = Party(tmp_path / "run").take()
    (tmp_path / "run" / NAME).unlink()
    (tmp_path / "run").rmdir()
    party.locks.heartbeat()
    party.locks.verify()
    Party(tmp_path / "run", **ELSEWHERE).take()
    with pytest.raises(LockLost):
        party.locks.verify()


def symlink(lock):
    (lock.parent / "victim").write_text("precious")
    lock.symlink_to("victim")


@pytest.mark.parametrize("plant", [os.mkfifo, symlink, Path.mkdir], ids=["fifo", "link", "folder"])
def test_what_is_no_file_is_refused_and_left_alone(tmp_path, plant):
    plant(tmp_path / NAME)
    with pytest.raises(InputError, match="remove it"):
        Party(tmp_path).take()
    assert os.path.lexists(tmp_path / NAME)
    assert not (tmp_path / "victim").exists() or (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"[" * 10_000,
        b"{}",
        b'{"pid": -1}',
        b"x" * 100_000,
        b'{"pid": 1e400, "token": null}',
    ],
    ids=["empty", "zeros", "deep", "no record", "negative", "huge", "wrong types"],
)
def test_a_damaged_lock_is_waited_for_like_one_of_another_host(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    second = Party(tmp_path).take()
    assert second.clock.now >= TIMING.patience
    second.locks.verify()


def test_a_record_reaches_the_terminal_without_control_characters(tmp_path):
    Party(tmp_path, command="\x1b]0;owned\x07\n").take()
    with pytest.raises(FolderInUse) as refusal:
        Party(tmp_path).take()
    assert str(refusal.value).isprintable()


def test_two_folders_are_taken_together_or_not_at_all(tmp_path):
    def both(party):
        other = RunFolder(str(tmp_path / "b"), "logging.dir", "cannot be written to")
        return [other, RunFolder(str(tmp_path / "a"), "checkpoint.save", "cannot save"), other]

    first = Party(tmp_path / "b").take()
    second = Party(tmp_path)
    with pytest.raises(FolderInUse, match=r"^logging\.dir"):
        second.locks.take(both(second))
    assert not (tmp_path / "a").exists()
    first.locks.release()
    second.locks.take(both(second))
    assert (tmp_path / "a" / NAME).exists() and (tmp_path / "b" / NAME).exists()
    second.locks.release()


def test_one_folder_by_two_names_is_taken_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real").mkdir()
    locks = RunLocks(timing=TIMING)
    locks.take([RunFolder(str(tmp_path / name), name, name) for name in ("real", "link", "real/.")])
    assert [p.name for p in (tmp_path / "real").iterdir()] == [NAME]
    locks.release()


def test_a_full_disk_neither_ends_a_run_nor_frees_its_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    first = Party(tmp_path).take()
    assert (tmp_path / NAME).stat().st_size == 0
    second = Party(tmp_path, lambda now: now >= 10 and first.locks.heartbeat())
    with pytest.raises(FolderInUseElsewhere):
        second.take()
    first.locks.verify()
    monkeypatch.undo()
    first.locks.heartbeat()
    with pytest.raises(FolderInUse, match="process"):
        Party(tmp_path).take()
    first.locks.release()


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    first = Party(tmp_path, **ELSEWHERE).take()
    second = Party(tmp_path).take()
    with pytest.raises(LockLost):
        first.locks.verify()
    second.locks.verify()
    second.locks.release()
    assert not list(tmp_path.iterdir())


def test_locks_outlast_what_is_being_written(tmp_path):
    party, writing = Party(tmp_path).take(), Future()
    party.locks.keep_until(writing)
    party.locks.release()
    party.locks.verify()
    assert (tmp_path / NAME).exists()
    writing.set_result(None)
    assert not (tmp_path / NAME).exists()


def test_a_hung_heartbeat_does_not_hold_the_end_up(tmp_path, monkeypatch):
    locks, begun, go_on = RunLocks(timing=Timing(0.01, join=0.1)), Event(), Event()
    monkeypatch.setattr(os, "fsync", lambda _: (begun.set(), go_on.wait(30)) if begin else None)
    begin = False
    locks.take([RunFolder(str(tmp_path), "a", "a")])
    begin = True
    assert begun.wait(10)
    started = time.monotonic()
    locks.release()
    assert time.monotonic() - started < 5
    go_on.set()


def test_the_heartbeat_moves(tmp_path):
    locks = RunLocks(timing=Timing(heartbeat=0.01))
    locks.take([RunFolder(str(tmp_path), "a", "a")])
    beats = {json.loads((tmp_path / NAME).read_text())["heartbeat"] for _ in range(200)}
    deadline = time.monotonic() + 10
    while len(beats) < 3 and time.monotonic() < deadline:
        beats.add(json.loads((tmp_path / NAME).read_text())["heartbeat"])
    locks.release()
    assert len(beats) >= 3


def test_before_a_process_is_started(tmp_path, gone):
    folder = Party(tmp_path).folder
    assert running_here(folder, {}) is None
    first = Party(tmp_path, environment=SLURM).take()
    assert f"process {os.getpid()}" in running_here(folder, {})
    assert running_here(folder, SLURM) is None  # the ranks wait for its end
    first.locks.release()
    Party(tmp_path, **gone).take()
    assert running_here(folder, {}) is None


@pytest.mark.parametrize("pid", ["0", "-1", str(2**31), "x"])
def test_a_folder_is_held_for_processes_only(pid, tmp_path):
    with pytest.raises(InputError):
        hold([str(tmp_path), pid, "script.sh"])
    assert not list(tmp_path.iterdir())


def test_a_folder_held_for_a_script(tmp_path):
    script = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert hold([str(tmp_path), str(script.pid), "script.sh"]) is None
    with pytest.raises(FolderInUse, match=rf"process {script.pid} .*script\.sh"):
        Party(tmp_path).take()
    script.communicate(b"\n")
    Party(tmp_path).take().locks.release()


RIVALS = """
import multiprocessing, os, sys
from pathlib import Path
from fp8lm.runtime.errors import FolderInUse
from fp8lm.runtime.holder import this_process
from fp8lm.runtime.lock_file import NAME, create_lock
from fp8lm.runtime.run_lock import RunFolder, RunLocks

def rival(folder, start, end):
    locks = RunLocks(say=lambda line: None)
    start.wait()
    try:
        locks.take([RunFolder(folder, "save", "save")])
    except FolderInUse:
        end.wait()
        os._exit(2)
    end.wait()
    locks.verify()
    locks.release()
    os._exit(0)

folder, rounds, stale = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
fork = multiprocessing.get_context("fork")
for _ in range(rounds):
    if stale:
        ended = {"pid": 2**22 + 1, "process_start": "1"}
        create_lock(Path(folder, NAME), this_process({}).model_copy(update=ended))
    start, end = fork.Barrier(8), fork.Barrier(8)
    rivals = [fork.Process(target=rival, args=(folder, start, end)) for _ in range(8)]
    for process in rivals:
        process.start()
    for process in rivals:
        process.join()
    print(*sorted(process.exitcode for process in rivals), *os.listdir(folder))
"""


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_eight_rivals_wins(tmp_path, stale):
    command = [sys.executable, "-c", RIVALS, str(tmp_path), "3", str(stale)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["0 2 2 2 2 2 2 2"] * 3, done.stderr
