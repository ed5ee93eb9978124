"""Names the rank that a slow step, evaluation or save waits for, and where it is.

In synchronous training all ranks are as slow as the slowest, and none of them knows which that is.
So a thread of every process leaves a heartbeat in the job's store: a count, what it does, and
where in the program its main thread is. When a step takes many times the usual, or the first ones
minutes, the reporting rank reads them and names

    silent ranks     whose count stands still: dead, stopped or swapping
    slow ranks       whose main thread is at work, while the others wait in a collective

Where the main thread is says what is slow: reading data, say. Of a GPU it says what the host does.
A single process is told that of itself.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch.distributed as dist

from fp8lm.comm.groups import ProcessGroups
from fp8lm.runtime.streams import warn

INTERVAL = 2.0  # seconds between heartbeats
SHORTEST = 10.0  # seconds; shorter steps are never reported
UNUSUAL = 300.0  # seconds after which a step is, before the usual time is known
SILENT_AFTER = 4  # heartbeats missed
_WAITING = ("fp8lm.comm.", "fp8lm.training.progress", "fp8lm.checkpoint.collectives")
_MOST_NAMED = 4


class Watchdog:
    """Watches what this rank does, and on the reporting one what all do; a context manager.

    A step is slow after `factor` times the usual time (0: never) and at least `shortest` seconds,
    one of the first after `unusual`. The reporting rank is the lowest that is not silent; it writes
    one line to stderr.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        factor: float,
        *,
        interval: float = INTERVAL,
        shortest: float = SHORTEST,
        unusual: float = UNUSUAL,
    ) -> None:
        self.rank, self.world_size = groups.world.rank(), groups.world.size()
        self.store = None if groups.store is None else dist.PrefixStore("watchdog", groups.store)
        self.factor, self.interval = factor, interval
        self.shortest, self.unusual = shortest, unusual
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=50))
        self._stopped = threading.Event()
        self._started: float | None = None
        self._what, self._usual, self._limit = "nothing", "", float("inf")

    def __enter__(self) -> Watchdog:
        self._main = threading.get_ident()
        if self.factor > 0 and (self.world_size == 1 or self.store is not None):
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def step(self, iteration: int) -> AbstractContextManager[None]:
        """Watch one step."""
        return self._watch("step", f"iteration {iteration}")

    def phase(self, what: str) -> AbstractContextManager[None]:
        """Watch `what` is done between steps, an evaluation, say; between them nothing is."""
        return self._watch(what, what)

    @contextmanager
    def _watch(self, kind: str, what: str) -> Iterator[None]:
        durations = self._durations[kind]
        self._what = what
        self._usual, self._limit = "", self.unusual
        # The first steps are slower than the usual one: they tune, compile and fill caches.
        if len(durations) >= 3:
            usual = statistics.median(durations)
            self._usual = f" (usually {usual:.1f} s)"
            self._limit = max(self.shortest, self.factor * usual)
        started = self._started = time.monotonic()
        try:
            yield
            durations.append(time.monotonic() - started)
        finally:  # a loss spike ends a step, too, and going back may take long
            self._started = None

    def _run(self) -> None:
        seen = Heartbeats(self.world_size)
        count = 0
        try:
            while not self._stopped.wait(self.interval):
                if self.world_size > 1 and self.store is not None:
                    count += 1
                    what = self._what.replace(" ", "_")
                    where = f"{socket.gethostname()} {os.getpid()} {place_of(self._main)}"
                    self.store.set(str(self.rank), f"{count} {what} {where}")
                self._look(seen)
        except RuntimeError:
            return  # the store is gone, and with it the job

    def _look(self, seen: Heartbeats) -> None:
        started = self._started
        if started is None or time.monotonic() - started < self._limit:
            seen.polls = 0
            return
        verdict = f"it is in {place_of(self._main)}"
        if self.world_size > 1 and self.store is not None:
            seen.read(self.store)
            if seen.polls <= SILENT_AFTER or set(range(self.rank)) - set(seen.silent):
                return  # not sure yet, or a lower rank reports
            verdict = seen.verdict()
        took = time.monotonic() - started
        self._limit = 2.0 * took  # not again before it has taken twice as long
        warn(f"{self._what} has taken {took:.0f} s{self._usual}: {verdict}")


class Heartbeats:
    """What the ranks' last heartbeats said, and for how many polls each has not changed."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.polls = world_size, 0
        self._last: dict[int, list[str]] = {}
        self._unchanged: dict[int, int] = {}

    def read(self, store: dist.Store) -> None:
        """Poll once."""
        self.polls += 1
        for rank in range(self.world_size):
            beat = store.get(str(rank)).decode().split(" ", 4) if store.check([str(rank)]) else []
            same = self.polls > 1 and beat == self._last.get(rank)
            self._unchanged[rank] = self._unchanged.get(rank, 0) + 1 if same else 0
            self._last[rank] = beat

    @property
    def silent(self) -> list[int]:
        """Ranks without a new heartbeat."""
        return [rank for rank, polls in self._unchanged.items() if polls >= SILENT_AFTER]

    def verdict(self) -> str:
        """Who is to blame, in words."""
        if silent := self.silent:
            return f"{self._names(silent)} silent (stopped, swapping or dead)"
        at_work = [rank for rank, beat in self._last.items() if not _waits(beat[4])]
        if at_work and len(at_work) < self.world_size:
            return f"{self._names(at_work)} not done: " + "; ".join(
                self._last[rank][4] for rank in at_work[:_MOST_NAMED]
            )
        doing = "wait for each other" if not at_work else "are at work"
        return f"all ranks {doing}; rank 0 is in {self._last[0][4]}"

    def _names(self, ranks: list[int]) -> str:
        named = ", ".join(
            f"{rank} ({self._last[rank][2]}, process {self._last[rank][3]})"
            if self._last[rank]
            else str(rank)
            for rank in ranks[:_MOST_NAMED]
        )
        more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
        return f"rank {named} is" if len(ranks) == 1 else f"ranks {named}{more} are"


def place_of(thread: int) -> str:
    """The innermost function of this package that `thread` is in: `module.function, line N`."""
    frame = sys._current_frames().get(thread)  # noqa: SLF001 (documented)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("fp8lm."):
            return f"{module}.{frame.f_code.co_name}, line {frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _waits(place: str) -> bool:
    return place.startswith(_WAITING)
