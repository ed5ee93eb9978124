"""The record in a run lock: which process holds it, and whether that process still runs.

A process is identified by host, boot, pid namespace, pid and start time, so that neither a reused
pid nor another container's pid is taken for it. Whether a process of another host runs cannot be
known from here; only its heartbeat shows it.
"""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(max_length=400)]
# Linux gives the pid namespace that every machine boots with this fixed number; containers have
# others.
_INITIAL_NAMESPACE = "pid:[4026531836]"


class Holder(BaseModel):
    """A process that holds a lock, as JSON. `token` is unique to each time a lock is taken.

    `job` and `launcher` name what started the process, empty where nothing did. Times are for
    people to read: clocks of hosts differ, and nothing compares them.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    host: Text
    boot_id: Text
    machine_id: Text
    pid_namespace: Text
    pid: int = Field(ge=1, lt=2**31)
    process_start: Text
    token: str = Field(pattern="^[0-9a-f]{32}$")
    since: Text
    heartbeat: Text
    job: Text = ""
    launcher: Text = ""
    command: Text = ""

    def to_bytes(self) -> bytes:
        """One JSON object; its length does not change with the heartbeat."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    def at(self, when: str) -> Holder:
        """The same with a heartbeat at `when`."""
        return self.model_copy(update={"heartbeat": when})

    def __str__(self) -> str:
        job = f"{self.job}, " if self.job else ""
        text = f"process {self.pid} on {self.host} since {self.since} ({job}{self.command})"
        # It may be anybody's text: no control characters on a terminal.
        return "".join(c if c.isprintable() else "?" for c in text)


def this_process(
    environment: Mapping[str, str], command: Sequence[str] = sys.argv, pid: int | None = None
) -> Holder:
    """This process as a holder, or `pid` of this machine, with a new token."""
    when, pid = timestamp(), os.getpid() if pid is None else pid
    return Holder(
        host=socket.gethostname()[:400],
        boot_id=_read("/proc/sys/kernel/random/boot_id"),
        machine_id=_read("/etc/machine-id"),
        pid_namespace=_pid_namespace(),
        pid=pid,
        process_start=_process_start(pid) or "",
        token=secrets.token_hex(16),
        since=f"{when[:10]} {when[11:19]} UTC",
        heartbeat=when,
        job=_job(environment),
        launcher=_launcher(environment),
        command=_shown(command),
    )


def timestamp() -> str:
    """UTC now, always of the same length."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def is_alive(holder: Holder, here: Holder) -> bool | None:
    """Whether the process of `holder` runs; None: that cannot be known from `here`."""
    if _same_place(holder, here):
        return _runs(holder.pid, holder.process_start)
    return False if _booted_since(holder, here) else None


def same_job(holder: Holder, here: Holder) -> bool:
    """Whether one job started both, as a cluster or torchrun does that starts it again."""
    same_launcher = _same_place(holder, here) and holder.launcher == here.launcher != ""
    return same_launcher or holder.job == here.job != ""


def _same_place(one: Holder, two: Holder) -> bool:
    places = [(h.host, h.boot_id, h.pid_namespace) for h in (one, two)]
    return places[0] == places[1] and one.pid_namespace != ""


def _booted_since(holder: Holder, here: Holder) -> bool:
    """Whether the machine of `holder` is this one, before its last boot.

    Containers are left out: a replaced one often has the name, and the machine id of its image, of
    one that may still run elsewhere.
    """
    spaces = {holder.pid_namespace, here.pid_namespace}
    same = (holder.host, holder.machine_id) == (here.host, here.machine_id)
    other_boot = "" not in (holder.boot_id, here.boot_id) and holder.boot_id != here.boot_id
    return spaces == {_INITIAL_NAMESPACE} and holder.machine_id != "" and same and other_boot


def _runs(pid: int, start: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    found = _process_start(pid)
    if found is None or start == "":
        return True  # hidden from this user, say
    return found == start


def _process_start(pid: int) -> str | None:
    """What tells a process from others that had its pid; "" if it has ended, None if unknown.

    On Linux clock ticks since boot: a time of day would change when the clock is set.
    """
    if not sys.platform.startswith("linux"):
        try:
            process = psutil.Process(pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            return "" if ended else f"{process.create_time():.2f}"
        except psutil.NoSuchProcess:
            return ""
        except psutil.Error:
            return None
    if not (stat := _read(f"/proc/{pid}/stat")):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold spaces and parentheses
    return "" if fields[0] in "ZX" else fields[19]


def _pid_namespace() -> str:
    """In which pids are counted; "" if pids cannot be looked up here."""
    if not sys.platform.startswith("linux"):
        return sys.platform
    try:
        # A /proc of another namespace shows other processes under our numbers.
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _job(environment: Mapping[str, str]) -> str:
    number = environment.get("SLURM_JOB_ID", "")
    return f"SLURM job {number}"[:400] if number else ""


def _launcher(environment: Mapping[str, str]) -> str:
    """The torchrun that started this process, and starts it again."""
    if not environment.get("TORCHELASTIC_RUN_ID"):
        return ""
    return f"{os.getppid()} {_process_start(os.getppid()) or ''}"


def _shown(command: Sequence[str]) -> str:
    text = shlex.join(command)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()[:400]
    except OSError:
        return ""
