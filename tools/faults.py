"""Break trainings and checkpoints in every way that they should survive, and count.

python tools/faults.py [--only KIND ...] [--runs N] [--seed 1] [--output FILE]

    kill-job       SIGKILL to all processes at a random moment or in a save; the same command again
    kill-worker    SIGKILL to one process; torchrun starts all again
    stop           SIGSTOP to one process for some seconds
    network        the network of a job cut for some seconds, or for good (then started again)
    disk           a disk full or read-only, with the same command again once there is room
    double         the same command a second time while the first one runs
    flip           one bit of a checkpoint's files flipped
    hostile        a checkpoint rewritten by somebody who can make its checksums right (hostile.py)

A training survives if every report and every byte of its last checkpoint are those of a run that
nothing has disturbed. A checkpoint survives if the damaged one is passed over for the one before it
and every tool ends with one line. `network` and `disk` need root and Linux, and are left out
elsewhere. Prints a table; exit code 1 if anything was not survived.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint as checkpoint_tool
from chaos import PATIENCE, POLL, ROOT, Job, compare, disturb, new_folder
from hostile import FACTS, REWRITTEN, SPECIAL, flip_bit, sign

from fp8lm.arguments import file_to_write, folder_to_write, number_type, split_overrides
from fp8lm.checkpoint import find_checkpoint, open_checkpoint
from fp8lm.checkpoint.files import LATEST, saved_iterations
from fp8lm.data.files import write_aside
from fp8lm.launch.lost_link import is_running
from fp8lm.runtime.errors import CommandParser, run_command

ITERATIONS, SAVE_INTERVAL = 30, 5
TOO_LONG = 20.0  # seconds for one look at a checkpoint
CLONE_NEWNS = 0x20000
SMALL = (
    *("model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4"),
    *("model.seq_length=64", "train.global_batch_size=8", "train.micro_batch_size=4"),
    *("train.eval_iters=1", "train.num_threads=1", "model.hidden_dropout=0.1"),
)


@dataclass
class Tally:
    """What came of one kind of fault."""

    runs: int = 0
    failures: list[str] = field(default_factory=list)
    left_out: str | None = None
    seconds: float = 0.0


class Bench:
    """Jobs of one command in folders of their own, and the run that nothing disturbs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder
        self.rng = random.Random(options.seed)
        self.reference = self.job("undisturbed")
        self._jobs: list[Job] = []

    def job(self, name: str, restarts: int = 0, prefix: tuple[str, ...] = (), *more: str) -> Job:
        """A job in a new folder `name`, with `more` overrides."""
        overrides = [*SMALL, f"train.train_iters={ITERATIONS}", *self.options.overrides, *more]
        options = argparse.Namespace(
            config=self.options.config,
            processes=self.options.processes,
            save_interval=SAVE_INTERVAL,
            kills=0,
            overrides=overrides,
        )
        return Job(options, new_folder(self.folder / name), restarts, prefix)

    def judge(self, job: Job) -> str | None:
        """What `job` lost against the undisturbed one, None if nothing."""
        return "; ".join(compare(self.reference, job)) or None

    def checkpoint_pair(self, name: str) -> Path:
        """A copy of the undisturbed run's checkpoints."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(self.reference.checkpoints, target)


Results = Iterator[str | None]  # of each run: what went wrong, None if nothing


def kill_job(bench: Bench, runs: int) -> Results:
    """See the module."""
    yield from killed(bench, runs, "job")


def kill_worker(bench: Bench, runs: int) -> Results:
    """See the module."""
    yield from killed(bench, runs, "worker")


def killed(bench: Bench, runs: int, victim: str) -> Results:
    """Jobs of two kills each, which are over before their iterations are."""
    for first in range(0, runs, 2):
        kills = min(2, runs - first)
        job = bench.job(f"kill-{victim}", 10 * kills if victim == "worker" else 0)
        options = argparse.Namespace(kills=kills, victim=victim)
        problem = None
        try:
            for number, _ in enumerate(disturb(job, options, bench.rng)):
                if number < kills - 1:
                    yield None
            problem = bench.judge(job)
        except RuntimeError as error:
            problem = str(error)
        finally:
            job.end()
        yield problem


def stop(bench: Bench, runs: int) -> Results:
    """See the module."""
    for _ in range(runs):
        job = bench.job("stop")
        with running(job):
            after_save(job)
            worker = bench.rng.choice(job.workers())
            worker.send_signal(signal.SIGSTOP)
            time.sleep(bench.rng.uniform(1.0, 6.0))
            worker.send_signal(signal.SIGCONT)
            yield ended(job) or bench.judge(job)


def network(bench: Bench, runs: int) -> Results:
    """See the module."""
    prefix = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        raise LookupError("no network of its own is allowed here")
    for number in range(runs):
        for_good = number % 2 == 1
        # A cut for good is noticed when a collective has taken too long.
        timeout = "parallel.distributed_timeout_minutes=" + ("0.2" if for_good else "2")
        job = bench.job("network", 0, prefix, timeout)
        with running(job):
            after_save(job)
            set_link(job, "down")
            if for_good:
                # A launcher waits longer for a network than its workers do; a cluster would not.
                waits = None if workers_end(job) else "workers wait forever for a network"
                yield waits or again(job) or bench.judge(job)
            else:
                time.sleep(bench.rng.uniform(1.0, 8.0))
                set_link(job, "up")
                yield ended(job) or bench.judge(job)


def workers_end(job: Job) -> bool:
    """Whether all workers of `job` end; its launcher may not take note of that."""
    workers, deadline = job.workers(), time.monotonic() + PATIENCE
    while any(map(is_running, workers)):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def set_link(job: Job, state: str) -> None:
    """Take the loopback device of the job's network up or down."""
    enter = ["nsenter", "-t", str(job.process.pid), "-n"]
    subprocess.run([*enter, "ip", "link", "set", "lo", state], check=True)


def disk(bench: Bench, runs: int) -> Results:
    """See the module."""
    if not private_mounts():
        raise LookupError("mounting a file system is not allowed here")
    size = sum(file.stat().st_size for file in newest(bench.reference).iterdir())
    for number in range(runs):
        yield (full_disk if number % 2 == 0 else read_only_disk)(bench, int(2.6 * size))


def full_disk(bench: Bench, size: int) -> str | None:
    """Fill the disk, see one line and code 1, then go on with checkpoint.keep_last=1."""
    job = bench.job("disk")
    with mounted(job.checkpoints, size), running(job):
        code = job.process.wait(PATIENCE)
        if complaint := traceback_in(job):
            return complaint
        if code == 0 or not saved_iterations(job.checkpoints):
            return f"the disk was not full, or empty: exit code {code}"
        job.command.append("checkpoint.keep_last=1")
        return again(job) or judge_saved(bench, job)


def read_only_disk(bench: Bench, size: int) -> str | None:
    """Make the disk read-only in the middle, and writable again for the next start."""
    job = bench.job("disk", 0, (), "checkpoint.keep_last=1")
    with mounted(job.checkpoints, size), running(job):
        after_save(job)
        while job.saving:
            time.sleep(POLL)
        done = subprocess.run(
            ["mount", "-o", "remount,ro", str(job.checkpoints)], capture_output=True
        )
        if done.returncode == 0:
            job.process.wait(PATIENCE)
            subprocess.run(["mount", "-o", "remount,rw", str(job.checkpoints)], check=True)
        return traceback_in(job) or again(job) or judge_saved(bench, job)


def judge_saved(bench: Bench, job: Job) -> str | None:
    """What was lost; the checkpoints are moved off the mounted disk first."""
    copy = job.folder / "kept"
    shutil.copytree(job.checkpoints, copy)
    job.checkpoints = copy
    return bench.judge(job)


def double(bench: Bench, runs: int) -> Results:
    """See the module."""
    for _ in range(runs):
        job = bench.job("double")
        with running(job):
            after_save(job)
            with paused(job):  # or it could be over before the second one has started
                done = subprocess.run(job.command, cwd=ROOT, capture_output=True, text=True)
            refused = [line for line in done.stderr.splitlines() if "error: " in line]
            if done.returncode == 0 or not refused or "Traceback (most" in done.stderr:
                yield f"the second job ended with {done.returncode}: {done.stderr[-300:]}"
                continue
            yield ended(job) or bench.judge(job)


def flip(bench: Bench, runs: int) -> Results:
    """See the module."""
    root = bench.checkpoint_pair("flip")
    newest_one, before = saved_iterations(root)[:2]
    folder = root / f"iter_{newest_one:07d}"
    paths = [*(folder / name for name in FACTS), *folder.glob("*.distcp"), root / LATEST]
    for _ in range(runs):
        path = bench.rng.choice(paths)
        original = path.read_bytes()
        flip_bit(path, bench.rng)
        # A digit of the latest file may become another one, which names an older checkpoint.
        expected = saved_iterations(root) if path.name == LATEST else [before]
        yield looked_at(root, expected, f"a flipped bit in {path.name}")
        path.write_bytes(original)


def hostile(bench: Bench, runs: int) -> Results:
    """See the module."""
    changes = [(name, change, True) for name, change in REWRITTEN.items()]
    changes += [(name, change, False) for name, change in SPECIAL.items()]
    for number in range(runs):
        name, change, signed = changes[number % len(changes)]
        root = bench.checkpoint_pair("hostile")
        newest_one, before = saved_iterations(root)[:2]
        folder = root / f"iter_{newest_one:07d}"
        change(folder)
        if signed:
            sign(folder)
        problem = looked_at(root, [before], name)
        yield problem or tools_on(folder, bench.folder / "hostile-output", name)


def looked_at(root: Path, expected: list[int], name: str) -> str | None:
    """Whether the newest valid checkpoint of `root` is one of those `expected`, found in time."""
    started = time.monotonic()
    try:
        found = find_checkpoint(root)
    except Exception as error:  # whatever a crafted file may cause
        return f"{name}: {type(error).__name__}: {error}"
    if found is None or found.iteration not in expected:
        return f"{name}: found {found and found.iteration}, expected {expected}"
    return took_too_long(started, name)


def tools_on(folder: Path, output: Path, name: str) -> str | None:
    """Whether every command of tools/checkpoint.py ends with one line about `folder`, in time."""
    calls = {"verify": [folder], "inspect": [folder], "compare": [folder, folder]}
    calls |= {"release": [folder, output], "merge": [folder, output]}
    started = time.monotonic()
    for command, arguments in calls.items():
        said = io.StringIO()
        argv = [command, *map(str, arguments)]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = run_command(checkpoint_tool.main, argv)
        except Exception as error:  # whatever a crafted file may cause
            return f"{name}, {command}: {type(error).__name__}: {error}"
        lines = said.getvalue().splitlines()
        if code != (1 if command == "verify" else 2) or len(lines) > 1 or output.exists():
            return f"{name}, {command}: exit code {code}, {len(lines)} lines"
    return took_too_long(started, name)


def took_too_long(started: float, name: str) -> str | None:
    """A complaint about what began at `started`, None if it was quick."""
    seconds = time.monotonic() - started
    return f"{name}: took {seconds:.0f} s" if seconds > TOO_LONG else None


@contextlib.contextmanager
def running(job: Job) -> Iterator[None]:
    """Start `job`, and end it on leaving if it still runs."""
    job.start()
    try:
        yield
    finally:
        job.end()


@contextlib.contextmanager
def paused(job: Job) -> Iterator[None]:
    """Stop the training processes of `job` for the duration of a `with` block."""
    workers = job.workers()
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()


def after_save(job: Job) -> None:
    """Wait until `job` has saved once; RuntimeError if it ends before."""
    deadline = time.monotonic() + PATIENCE
    while not job.last_saved:
        if job.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no checkpoint in {job.folder}, see its log.txt")
        time.sleep(POLL)


def ended(job: Job) -> str | None:
    """A complaint unless the running `job` ends well by itself."""
    code = job.process.wait(PATIENCE)
    return f"exit code {code}, see {job.folder}/log.txt" if code else None


def again(job: Job) -> str | None:
    """A complaint unless `job` ends well, by itself or when started once more."""
    if job.process.poll() != 0:
        job.end()
        job.start()
    return ended(job)


def traceback_in(job: Job) -> str | None:
    """A complaint if the log of `job` holds a traceback of this program's processes."""
    log = (job.folder / "log.txt").read_text(errors="replace")
    return f"a traceback in {job.folder}/log.txt" if "Traceback (most" in log else None


def newest(job: Job) -> Path:
    """The folder of the newest checkpoint."""
    return open_checkpoint(job.checkpoints).folder


def private_mounts() -> bool:
    """Whether this process and those that it starts may mount without others seeing it."""
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(CLONE_NEWNS):
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A disk of `size` bytes on `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: what does it, and how many runs there are without --runs."""

    run: Callable[[Bench, int], Results]
    runs: int


KINDS = {
    "flip": Kind(flip, 1000),
    "hostile": Kind(hostile, len(REWRITTEN) + len(SPECIAL)),
    "disk": Kind(disk, 2),
    "stop": Kind(stop, 2),
    "double": Kind(double, 2),
    "network": Kind(network, 2),
    "kill-job": Kind(kill_job, 4),
    "kill-worker": Kind(kill_worker, 4),
}


def main(argv: list[str]) -> int:
    """Try every kind, print the table; exit code 1 if anything was not survived."""
    options = parse(argv)
    bench = Bench(options)
    with running(bench.reference):
        bench.reference.finish()
    tallies: dict[str, Tally] = {}
    for name in options.only:
        tallies[name] = tried(bench, name, options.runs)
        if options.output:  # after each kind: the whole takes minutes
            write_report(options, tallies)
    print_table(tallies)
    return 1 if any(tally.failures for tally in tallies.values()) else 0


def write_report(options: argparse.Namespace, tallies: dict[str, Tally]) -> None:
    """What came of every kind so far, as JSON."""
    report = {
        "kinds": {name: asdict(tally) for name, tally in tallies.items()},
        "processes": options.processes,
        "seed": options.seed,
        "overrides": options.overrides,
    }
    write_aside(options.output, json.dumps(report, indent=1) + "\n")


def tried(bench: Bench, name: str, runs: int | None) -> Tally:
    """All runs of one kind."""
    kind, tally, started = KINDS[name], Tally(), time.monotonic()
    count = kind.runs if runs is None else runs
    bar = tqdm(total=count, desc=name, disable=None)
    try:
        for problem in kind.run(bench, count):
            tally.runs += 1
            bar.update()
            if problem is not None:
                tally.failures.append(problem)
                bar.write(f"{name}: {problem}")
    except LookupError as error:
        tally.left_out = str(error)
    except (RuntimeError, subprocess.SubprocessError) as error:
        tally.failures.append(str(error))
    bar.close()
    tally.seconds = round(time.monotonic() - started, 1)
    return tally


def print_table(tallies: dict[str, Tally]) -> None:
    """One row for each kind, in Markdown."""
    print("| fault | runs | survived |\n|---|---|---|")
    for name, tally in tallies.items():
        survived = tally.left_out or tally.runs - len(tally.failures)
        print(f"| {name} | {tally.runs} | {survived} |")
        for problem in tally.failures[:5]:
            print(f"{name}: {problem}", file=sys.stderr)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    lines = __doc__.splitlines()
    parser = CommandParser(
        description=lines[0],
        epilog="\n".join(lines[4:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "gpt_tiny.yaml"))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--runs", type=number_type(1), help="of each kind")
    parser.add_argument("--processes", type=number_type(1), default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=folder_to_write, default=ROOT / "runs" / "faults")
    parser.add_argument("--output", type=file_to_write)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    argv, overrides = split_overrides(argv)
    return parser.parse_args([*argv, "--", *overrides])


if __name__ == "__main__":
    sys.exit(run_command(main))
