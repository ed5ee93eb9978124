"""Exit codes of a job: what workers ended with, or the signal that its launcher got."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import psutil
import pytest

from fp8lm.launch.exits import describe_exit, job_exit_code, signal_exit_code
from fp8lm.runtime.errors import ENDS, run_command
from tests.launch.conftest import ENVIRONMENT, ROOT

AGENT = [sys.executable, "-m", "fp8lm.launch.agent", "--nproc-per-node=2"]
AGENT += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
WORKER = "tests/launch/worker.py"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([1], 1),
        ([3, 1], 3),
        ([-9], 137),
        ([-11, 1], 139),
        ([1, 2], 2),
        ([-15, 75], 75),
        ([75, 2], 2),
        ([1, -15], 1),
    ],
)
def test_code_of_a_job(codes, expected):
    assert job_exit_code(codes) == expected


@pytest.mark.parametrize(
    ("number", "codes", "expected"),
    [
        (signal.SIGTERM, [75, 75], 75),
        (signal.SIGUSR1, [75, 0], 75),
        (signal.SIGUSR1, [75], 138),  # the other was killed, or failed
        (signal.SIGTERM, [], 143),
        (signal.SIGTERM, [75, 2], 2),
        (signal.SIGINT, [75, 75], 130),
        (signal.SIGHUP, [], 129),
    ],
)
def test_code_after_a_signal(number, codes, expected):
    assert signal_exit_code(number, codes, 2) == expected


def test_codes_in_words():
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-100) == "was killed by signal 100"


def test_a_worker_says_that_it_has_started(tmp_path, monkeypatch):
    """What the worker in its place before it has left is gone by then."""
    monkeypatch.setenv(ENDS, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "1")
    mark = tmp_path / "1"
    mark.write_text("75")
    assert run_command(lambda argv: int(argv[0]) + len(mark.read_text()), ["3"]) == 3
    assert mark.read_text() == "3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "code", "told"),
    [
        (["0:0", "1:0"], 0, ""),
        (["1:2"], 2, "error: rank 1 ended with exit code 2"),
        (["0:75", "1:75"], 75, "ended with exit code 75"),
        (["0:-9"], 137, "error: rank 0 was killed by SIGKILL"),
    ],
)
def test_workers_under_torchrun(workers, code, told, tmp_path):
    """Together with the last lines of the log of the rank that failed."""
    logs = [f"--log-dir={tmp_path}", "--redirects=3", "--tee=3", "--local-ranks-filter=0"]
    done = subprocess.run(
        [*AGENT, *logs, WORKER, *workers],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    if code == 2:
        assert "attempt_0/1/stderr.log:\nrank 1 has failed" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_workers_and_leaves_them_time(launch, number):
    """Longer than a second of saving, of the sixty that they have here."""
    command = [*AGENT, SIGNALS, "--max-restarts=3", WORKER, "saves", "1"]
    job = launch(command, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
    for rank in (0, 1):
        job.wait_for(f"rank {rank} ready")
    job.process.send_signal(number)
    assert job.finish() == 75, job.output
    for rank in (0, 1):
        assert f"rank {rank} saved on {number.name}" in job.output
    assert job.output.count("ready") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("left", "expected"), [("3", 3), ("0", 138)])
def test_what_a_worker_could_not_save_is_not_called_saved(launch, left, expected):
    command = [*AGENT, SIGNALS, WORKER, "saves", "1", left]
    job = launch(command, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
    for rank in (0, 1):
        job.wait_for(f"rank {rank} ready")
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == expected, job.output


@pytest.mark.slow
def test_what_was_saved_before_a_restart_does_not_count(launch):
    job = launch([*AGENT, SIGNALS, "--max-restarts=1", WORKER, "again"])
    for rank in (0, 1):
        job.wait_for(f"rank {rank} ready")
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 143, job.output


@pytest.mark.slow
def test_nodes_that_do_not_meet(launch):
    """Nobody listens at that port; torchrun's own text is a page of traceback."""
    rendezvous = [
        "--nnodes=2",
        "--rdzv-endpoint=127.0.0.1:1",
        "--rdzv-conf=is_host=0,read_timeout=1",
    ]
    job = launch([*AGENT, *rendezvous, WORKER, "0:0"])
    assert job.finish() == 1
    assert "error: the nodes did not meet at 127.0.0.1:1" in job.output
    assert "Traceback" not in job.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "restarts", "told"),
    [
        (True, 0, "the connection to 127.0.0.1:{port} is lost: the node there has ended"),
        (False, 1, "another node has ended the job"),
    ],
)
def test_a_node_that_another_one_leaves(launch, host, restarts, told):
    """One finds a mistake and ends; the other had met it, and has to say something else than that.

    Without the host there is no meeting any more. Its workers' connections would break as well: the
    one that stays has a failure of its own here, when the other is gone.
    """
    port = free_port()
    rendezvous = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]

    def node(name, is_host, *more):
        return launch([*AGENT, *rendezvous, f"--rdzv-conf=is_host={int(is_host)}", *more], name)

    ended = node("ended", host, WORKER, "waits", "2", "2")
    stays = node("stays", not host, f"--max-restarts={restarts}", WORKER, "waits")
    assert ended.finish() == 2
    if not host:
        for worker in psutil.Process(stays.process.pid).children():
            worker.kill()
    assert stays.finish() == 1, stays.output
    assert "error: " + told.format(port=port) in stays.output
    assert "did not meet" not in stays.output


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux ties processes together")
def test_workers_do_not_outlive_a_killed_launcher(launch):
    job = launch([*AGENT, WORKER, "waits"])
    for rank in (0, 1):
        job.wait_for(f"rank {rank} ready")
    workers = psutil.Process(job.process.pid).children()
    job.process.kill()
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=5)[1]
