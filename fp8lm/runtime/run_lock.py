"""One run at a time writes to a folder: a lock file with a heartbeat, on a shared file system too.

What becomes of the lock that a run finds:

    its process has ended                       taken over at once
    its process runs on this machine            refused at once
    it is on another machine, or of this job    watched: refused at its next heartbeat; without one
                                                for `patience` seconds taken over, unless it is
                                                known to run

Machines' clocks are not compared: a heartbeat is a change that the waiting process sees. A run that
was suspended or cut off for longer than others wait finds another token in its lock, and stops
before it writes again: see `RunLocks.verify`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8lm.runtime.errors import FolderInUse, FolderInUseElsewhere, InputError, LockLost
from fp8lm.runtime.files import NotRegular, make_folder
from fp8lm.runtime.holder import Holder, is_alive, same_job, this_process, timestamp
from fp8lm.runtime.lock_file import (
    NAME,
    Seen,
    create_lock,
    leftovers,
    read_lock,
    remove_lock,
    write_heartbeat,
)
from fp8lm.runtime.streams import say


@dataclass(frozen=True)
class Timing:
    """Seconds: between heartbeats; until silence is an end; to see whether a rival has won.

    At the end `join` seconds are left to a heartbeat under way, on a hung file system for instance.
    """

    heartbeat: float = 10.0
    patience: float = 60.0
    settle: float = 0.5
    poll: float = 1.0
    join: float = 2.0


class Clock:
    """Seconds, those in which the machine was suspended included where the system counts them."""

    sleep = staticmethod(time.sleep)

    @staticmethod
    def monotonic() -> float:
        """Since some moment."""
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True)
class RunFolder:
    """A folder that a run writes to: `key` names it in messages, `complaint` if it can't be."""

    path: str
    key: str
    complaint: str


class RunLocks:
    """The locks of the folders of one run; without any, as on most ranks, everything is allowed.

    `here` is this process, `clock` has `monotonic` and `sleep`, `say` takes a line of text.
    """

    def __init__(
        self,
        here: Holder | None = None,
        timing: Timing = Timing(),
        clock: Any = Clock,
        say: Callable[[str], None] = say,
    ) -> None:
        self._here, self._timing, self._clock, self._say = here, timing, clock, say
        self._locks: list[RunLock] = []
        self._writing: Future[Any] | None = None

    def take(self, folders: Sequence[RunFolder]) -> None:
        """Make and lock all of `folders`, or none.

        `FolderInUse` if a run holds one of them, `InputError` if one cannot be written to.
        """
        here = self._here or this_process(os.environ)
        # In one order in all runs: none waits for a folder while it holds another's.
        distinct = {os.path.realpath(folder.path): folder for folder in reversed(folders)}
        try:
            for _, folder in sorted(distinct.items()):
                lock = RunLock(folder, here, self._timing, self._clock, self._say)
                self._locks.append(lock)
                lock.acquire()
        except BaseException:
            self._release()
            raise

    @property
    def lost(self) -> bool:
        """Whether a heartbeat or `verify` has found a lock taken over."""
        return any(lock.lost is not None for lock in self._locks)

    def verify(self) -> None:
        """Raise `LockLost` if a lock is another run's now; OSError if that cannot be seen."""
        for lock in self._locks:
            lock.verify()

    def heartbeat(self) -> None:
        """Write the records now, besides the threads that do it from time to time."""
        for lock in self._locks:
            lock.heartbeat()

    def held(self) -> bool:
        """Whether no lock is seen to be another run's."""
        try:
            self.verify()
        except OSError:
            return True  # a file system that cannot be read now; heartbeats look again
        except LockLost:
            return False
        return True

    def keep_until(self, writing: Future[Any]) -> None:
        """Keep the locks until `writing` is done, though `release` may come before."""
        self._writing = writing

    def release(self) -> None:
        """Let others have the folders."""
        if self._writing is None:
            self._release()
        else:
            self._writing.add_done_callback(lambda _: self._release())

    def _release(self) -> None:
        for lock in self._locks:
            lock.release()
        self._locks = []


class RunLock:
    """The lock of one folder, with a thread for its heartbeat."""

    def __init__(
        self,
        folder: RunFolder,
        here: Holder,
        timing: Timing,
        clock: Any,
        say: Callable[[str], None],
    ) -> None:
        self.lost: str | None = None
        self._folder, self._path = folder, Path(folder.path) / NAME
        self._here, self._timing, self._clock, self._say = here, timing, clock, say
        self._file: tuple[int, int] | None = None
        self._beat_at = clock.monotonic()
        self._made: list[Path] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; see the module for what happens if there is one."""
        try:
            self._make_folder()
            self._create()
            self._beat_at = self._clock.monotonic()
        except NotRegular as error:
            raise InputError(f"{self._path} is no lock of a run: remove it") from error
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{self._folder.complaint}: {reason}") from error
        for left in leftovers(self._path):
            with suppress(OSError):
                left.unlink()
        self._thread = threading.Thread(target=self._run, name="run lock", daemon=True)
        self._thread.start()

    def verify(self) -> None:
        """Raise `LockLost` if the lock is another's; OSError if that cannot be seen."""
        if self.lost is None:
            try:
                self._look(read_lock(self._path))
            except NotRegular as error:
                self.lost = str(error)
        if self.lost is not None:
            raise LockLost(
                f"{self._folder.key} is not this run's any more: {self.lost}; this run wrote no "
                "more there and ends"
            )

    def heartbeat(self) -> None:
        """Show that this run lives; what fails, as on a full disk, is tried again at the next."""
        with suppress(OSError):
            now, mine = self._clock.monotonic(), self._here.at(timestamp())
            self._look(write_heartbeat(self._path, mine, self._file))
            self._beat_at = now

    def release(self) -> None:
        """Remove the lock if it is this run's, and folders that were made for it and are empty."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(self._timing.join)
        if self._file is None or (self._thread is not None and self._thread.is_alive()):
            return
        with suppress(OSError):
            seen = read_lock(self._path)
            if seen is not None and self._is_mine(seen):
                remove_lock(self._path, self._is_mine)
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _run(self) -> None:
        while not self._stopped.wait(self._timing.heartbeat):
            self.heartbeat()

    def _is_mine(self, seen: Seen) -> bool:
        return seen.is_of(self._here.token, self._file)

    def _look(self, seen: Seen | None) -> None:
        """Take back a lock that was removed by hand; note if it is, or may have been, another's."""
        silent = self._clock.monotonic() - self._beat_at
        if seen is None and silent >= self._timing.patience:
            self.lost = (
                f"{self._path} is gone after {silent:.0f} s without a heartbeat of this run, in "
                "which another one may have come and gone"
            )
        elif seen is None:
            with suppress(FileNotFoundError):  # nobody holds a folder that is gone
                if (file := create_lock(self._path, self._here)) is not None:
                    self._file = file
                    return
                seen = read_lock(self._path)
        if seen is not None and not self._is_mine(seen):
            self.lost = f"taken over by {_who(seen, self._path)}"

    def _make_folder(self) -> None:
        folder = self._path.parent
        missing = [f for f in (folder, *folder.parents) if not os.path.lexists(f)]
        make_folder(folder)
        self._made = missing

    def _create(self) -> None:
        contested, watch = False, None
        while True:
            self._file = create_lock(self._path, self._here)
            if self._file is not None:
                if not (contested or leftovers(self._path)) or self._stays():
                    return
                continue
            contested = True
            seen = read_lock(self._path)
            if seen is None:
                self._clock.sleep(self._timing.settle / 10)
            elif self._has_ended(seen):
                remove_lock(self._path, seen.__eq__)
            elif watch is None or not watch.is_of(seen):
                watch = _Watch(seen, self._clock.monotonic() + self._timing.patience)
                who = _who(seen, self._path)
                self._say(f" waiting up to {self._timing.patience:.0f} s for a sign of {who}")
            elif watch.is_over(seen, self._clock.monotonic()):
                self._give_up_if_alive(seen, watch)
                remove_lock(self._path, seen.__eq__)
            else:
                self._clock.sleep(self._timing.poll)

    def _stays(self) -> bool:
        """Whether the lock is still this run's when rivals for the former one have had their try.

        One that had found the former stale may move this one away before it sees what it is.
        """
        self._clock.sleep(self._timing.settle)
        seen = read_lock(self._path)
        if seen is None:
            self._file = create_lock(self._path, self._here)
            return self._file is not None
        return self._is_mine(seen)

    def _has_ended(self, seen: Seen) -> bool:
        """Whether its process has; `FolderInUse` if it runs here, in another job."""
        holder = seen.holder
        if holder is None:
            return False
        alive = is_alive(holder, self._here)
        if alive and not same_job(holder, self._here):
            raise FolderInUse(in_use(self._folder.key, seen, self._path))
        return alive is False

    def _give_up_if_alive(self, seen: Seen, watch: _Watch) -> None:
        alive = seen.holder and is_alive(seen.holder, self._here)
        if alive or watch.has_changed(seen):
            raise FolderInUseElsewhere(in_use(self._folder.key, seen, self._path))


@dataclass(frozen=True)
class _Watch:
    """A lock as it was first seen, and until when to look for a heartbeat."""

    first: Seen
    deadline: float

    def is_of(self, seen: Seen) -> bool:
        tokens = {h.token for h in (self.first.holder, seen.holder) if h is not None}
        return self.first.file == seen.file and len(tokens) < 2  # a record may be seen half written

    def has_changed(self, seen: Seen) -> bool:
        return seen.mark != self.first.mark

    def is_over(self, seen: Seen, now: float) -> bool:
        return self.has_changed(seen) or now >= self.deadline


def in_use(key: str, seen: Seen, path: Path) -> str:
    """The message about a folder that another run holds."""
    return (
        f"{key} is in use by {_who(seen, path)}: end that run or wait for its end, or name "
        f"another folder; if it has ended, remove {path}"
    )


def running_here(folder: RunFolder, environment: Mapping[str, str]) -> str | None:
    """Why a new run may not write to `folder`, as far as can be told at once; None if it may."""
    path = Path(folder.path) / NAME
    try:
        seen = read_lock(path)
    except OSError as error:
        return str(error)
    if seen is None or seen.holder is None:
        return None
    here = this_process(environment)
    if is_alive(seen.holder, here) and not same_job(seen.holder, here):
        return in_use(folder.key, seen, path)
    return None


def _who(seen: Seen, path: Path) -> str:
    return f"a run that left no record in {path}" if seen.holder is None else str(seen.holder)
