"""Kill a training job at random moments and see whether anything is lost (see also faults.py).

python tools/chaos.py [--kills 20] [--processes 2] [--victim job|worker] [--seed 1] [--output FILE]
    [--config configs/gpt_tiny.yaml] [section.key=value ...]

Trains once undisturbed, then again under SIGKILL: half of the kills at any moment, half while a
checkpoint is being written. `job` kills every process and starts the same command again, as a
cluster would; `worker` kills one process and leaves the restart to torchrun. Nothing is lost if
every report of both runs and every byte of their last checkpoints are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil

from fp8lm.arguments import file_to_write, folder_to_write
from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.files import saved_iterations
from fp8lm.checkpoint.reader import differences
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, InputError, run_command
from fp8lm.runtime.run_lock import RunFolder, running_here

ROOT = Path(__file__).resolve().parents[1]
# Measurements of time and memory differ between any two runs.
MEASURED = (
    "iteration-time",
    "throughput",
    "tokens-per-second",
    "timestamp",
    "memory/rss",
    "memory/rss_peak",
)
POLL = 0.002
PATIENCE = 600.0
GRACE = 40.0  # torchrun gives its workers 30 seconds


@dataclass
class Kill:
    """One kill: when (seconds after the start of the job), in a save or not, iterations saved."""

    seconds: float
    in_save: bool
    saved: int


class Job:
    """The training under torchrun, as `fp8lm.launch` runs it; `prefix` is a command before it."""

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        restarts: int = 0,
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        launcher = [*prefix, sys.executable, "-m", "fp8lm.launch.agent", "--rdzv-backend=c10d"]
        launcher += ["--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}"]
        launcher += [f"--nproc-per-node={options.processes}", "--monitor-interval=0.05"]
        keys = [f"checkpoint.{key}={self.checkpoints}" for key in ("save", "load")]
        keys += [f"checkpoint.save_interval={options.save_interval}", f"logging.dir={folder}"]
        keys += ["logging.log_interval=1", "logging.tensorboard=false"]
        keys += [f"train.train_iters={10 * options.kills + 50}", *options.overrides]
        self.command = [*launcher, str(ROOT / "pretrain_gpt.py"), "--config", options.config, *keys]
        self._process: subprocess.Popen | None = None

    @property
    def process(self) -> subprocess.Popen:
        """The launcher of the last start."""
        if self._process is None:
            raise RuntimeError("the job has not been started")
        return self._process

    def start(self) -> None:
        """Start it in the background; its output goes to log.txt."""
        log = (self.folder / "log.txt").open("a")
        self._process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT)

    def finish(self) -> None:
        """Wait for its end; `InputError` or RuntimeError if that is not a good one."""
        if self.process.wait(PATIENCE):
            log = self.folder / "log.txt"
            for line in log.read_text().splitlines():
                if line.startswith("error: "):
                    raise InputError(f"{line.removeprefix('error: ')} (see {log})")
            raise RuntimeError(f"the job failed, see {log}")

    def end(self) -> None:
        """End what is still running, when something went wrong."""
        if self._process is not None and self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            self.process.kill()
            self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """The training processes."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []

    def kill(self, victim: str, rng: random.Random) -> None:
        """SIGKILL to all processes, or to one worker."""
        workers = self.workers()
        for process in (
            rng.sample(workers, len(workers)) if victim == "job" else [rng.choice(workers)]
        ):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if victim == "job":
            self.process.kill()
            self.process.wait()

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.checkpoints.glob(".iter_*.tmp"))

    @property
    def last_saved(self) -> int:
        """The newest checkpoint, 0 without one."""
        return max(saved_iterations(self.checkpoints), default=0)


def main(argv: list[str]) -> int:
    """Run both, compare, print; exit code 0 if nothing is lost, 1 otherwise."""
    options = parse(argv)
    undisturbed = Job(options, new_folder(options.folder / "undisturbed"))
    disturbed = Job(options, new_folder(options.folder / "disturbed"), 10 * options.kills)
    rng, kills = random.Random(options.seed), []
    try:
        undisturbed.start()
        undisturbed.finish()
        for kill in disturb(disturbed, options, rng):
            kills.append(kill)
            print(f"kill {len(kills)} of {options.kills}: {describe(kill)}", flush=True)
    finally:
        for job in (undisturbed, disturbed):
            job.end()
    lost = compare(undisturbed, disturbed)
    report = {
        "victim": options.victim,
        "processes": options.processes,
        "overrides": options.overrides,
        "kills": [asdict(kill) for kill in kills],
        "lost": lost,
        "final": final(undisturbed),
    }
    if options.output:
        write_aside(options.output, json.dumps(report, indent=1) + "\n")
    in_save = sum(kill.in_save for kill in kills)
    print(
        f"{len(kills)} kills, {in_save} of them in a save: " + ("; ".join(lost) or "nothing lost")
    )
    return 1 if lost else 0


def new_folder(folder: Path) -> Path:
    """An empty `folder`.

    `InputError` if it holds anything that this program has not made, or a run writes there.
    """
    log = folder / "log.txt"
    if folder.exists() and any(folder.iterdir()) and not log.exists():
        raise InputError(f"{folder} holds something else: choose another --folder")
    if user := running_here(RunFolder(str(folder), str(folder), ""), os.environ):
        raise InputError(user)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log.touch()
    return folder


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description="Kill a training job at random moments.")
    parser.add_argument("--config", default=str(ROOT / "configs" / "gpt_tiny.yaml"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--victim", choices=("job", "worker"), default="job")
    parser.add_argument("--save-interval", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=folder_to_write, default=ROOT / "runs" / "chaos")
    parser.add_argument("--output", type=file_to_write)
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args(argv)


def disturb(job: Job, options: argparse.Namespace, rng: random.Random) -> Iterator[Kill]:
    """Run `job` to its end under kills."""
    job.start()
    for number in range(options.kills):
        in_save = number % 2 == 1
        started, saved = time.monotonic(), job.last_saved
        while True:
            wait_for_moment(job, in_save, saved, rng)
            if job.process.poll() is not None:
                raise RuntimeError(f"the job ended before kill {number + 1}: train longer")
            job.kill(options.victim, rng)
            hit = job.saving
            if hit or not in_save:
                break
            if options.victim == "job":
                job.start()  # the save was over already: not counted, again
        yield Kill(time.monotonic() - started, hit, job.last_saved)
        if options.victim == "job":
            job.start()
    job.finish()


def wait_for_moment(job: Job, in_save: bool, saved: int, rng: random.Random) -> None:
    """Return at a random moment after the job has saved once more, or while it does."""
    deadline = time.monotonic() + PATIENCE
    left_over = job.saving  # by the kill before; removed when the job has started again
    while time.monotonic() < deadline and job.process.poll() is None:
        left_over = left_over and job.saving
        if in_save and job.saving and not left_over:
            time.sleep(rng.choice((0.0, 0.0, rng.uniform(0.0, 0.05))))
            return
        if not in_save and job.last_saved > saved:
            time.sleep(rng.uniform(0.0, 3.0))
            return
        time.sleep(POLL)


def describe(kill: Kill) -> str:
    """One line."""
    moment = "in a save" if kill.in_save else "between saves"
    return f"{moment}, {kill.seconds:.1f} s after the last, iteration {kill.saved} saved"


def compare(one: Job, two: Job) -> list[str]:
    """What differs between the reports and the last checkpoints of two jobs."""
    lost = []
    if reports(one) != reports(two):
        lost.append(f"the reports of {one.folder} and {two.folder} differ")
    last = open_checkpoint(one.checkpoints), open_checkpoint(two.checkpoints)
    return lost + list(islice(differences(*last), 3))


def reports(job: Job) -> list[dict]:
    """Every line of metrics.jsonl without measurements."""
    lines = (job.folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED}
        for line in lines
    ]


def final(job: Job) -> dict:
    """The last losses."""
    losses = [line for line in reports(job) if "lm loss validation" in line]
    return {
        "iteration": losses[-1]["iteration"],
        "lm loss validation": losses[-1]["lm loss validation"],
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
