"""Check a run, and start or describe it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8lm.config import load_config
from fp8lm.launch.command import (
    NODE_NAME,
    command_line,
    torchrun_arguments,
    torchrun_environment,
)
from fp8lm.launch.options import Options, parse_options
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.launchers import find_tasks
from fp8lm.runtime.output import show
from fp8lm.runtime.streams import complain, say

if TYPE_CHECKING:
    from fp8lm.config import Config
    from fp8lm.planner.plan import Plan

PATIENCE = 3.0  # seconds without a word


def main(argv: Sequence[str]) -> int:
    """Start what the command line describes; the exit code of the job (see `agent`)."""
    options = parse_options(argv)
    if not options.dry_run:
        check_alone_on_machine(options, os.environ)
    config = load_config(options.config, options.overrides)
    if options.simulate:
        options, config = on_the_cpu(options, config)
    with progress_line(f" checking {options.config} before the start"):
        # Imported once the config is known to be good: `--help` and mistakes answer at once.
        from fp8lm.launch import preflight

        processes = options.nproc_per_node or preflight.default_processes(config)
        plan = preflight.check_run(config, options.nnodes, processes)
    remarks = preflight.notes(plan.layout, options.max_restarts)
    problems = preflight.folder_problems(config, options.log_dir, options.node_rank in (None, 0))
    if options.dry_run:  # which may be of a cluster whose folders are not here
        remarks += [f"on this machine: {problem}" for problem in problems]
        lines = plan.table(options.all_ranks)
        if options.gpu is not None:
            with progress_line(" tracing a step"):
                lines += ["", *plan.predictions(options.gpu)]
        show(describe(plan, lines, _command(options, processes, argv), remarks))
        return 0
    for problem in problems:
        raise InputError(problem)
    preflight.check_devices(config, processes)
    endpoint = options.rdzv_endpoint
    if options.nnodes > 1 and not options.simulate and endpoint is not None:
        preflight.check_rendezvous(endpoint, is_host=options.node_rank == 0)
        if options.local_addr is None:
            options = replace(options, local_addr=preflight.local_address(endpoint))
    preflight.make_log_folder(options.log_dir)
    if options.node_rank in (None, 0):
        say(f" {plan.summary()[0]}")
        for remark in remarks:
            say(f" note: {remark}")
    return start(options, processes)


def check_alone_on_machine(options: Options, environment: Mapping[str, str]) -> None:
    """InputError if srun or mpirun has started more launchers than there are machines.

    Each would start all processes of its machine, and train for itself into the same folders.
    """
    tasks = find_tasks(environment)
    machines = 1 if options.simulate else options.nnodes
    if tasks is not None and tasks.size > machines:
        raise InputError(
            f"{tasks.launcher} has started this {tasks.size} times for {machines} machine"
            f"{'s' * (machines > 1)}: start it once on each (srun --ntasks-per-node=1, and "
            f"scripts/train_multinode.sh for several), or {tasks.launcher} python pretrain_gpt.py, "
            "which takes its ranks"
        )


def on_the_cpu(options: Options, config: Config) -> tuple[Options, Config]:
    """Both with train.device=cpu; InputError where GPUs are asked for.

    Simulated machines would share them, which NCCL refuses.
    """
    if config.train.device == "cuda":
        raise InputError("--simulate runs on this machine's CPU: drop train.device=cuda")
    if config.train.device == "auto":
        options = replace(options, overrides=(*options.overrides, "train.device=cpu"))
        config = load_config(options.config, options.overrides)
    return options, config


def describe(
    plan: Plan, table: Sequence[str], command: Sequence[str], remarks: Sequence[str]
) -> str:
    """What `--dry-run` prints."""
    lines = [*plan.summary(), "", *table, "", *command]
    return "\n".join([*lines, *(f"note: {remark}" for remark in remarks)])


def _command(options: Options, processes: int, argv: Sequence[str]) -> list[str]:
    """What would be started: where, and as a shell takes it."""
    environment = torchrun_environment(options)
    if options.simulate:  # the launcher holds the nodes' meeting: there is no command without it
        given = [argument for argument in argv if argument != "--dry-run"]
        return ["command for all nodes:", command_line({}, "fp8lm.launch", given)]
    arguments = torchrun_arguments(options, processes, name=NODE_NAME)
    return [
        f"command {_where(options)}:",
        command_line(environment, "fp8lm.launch.agent", arguments),
    ]


def _where(options: Options) -> str:
    if options.nnodes == 1:
        return "here"
    if options.node_rank is not None:
        return f"on node {options.node_rank} of {options.nnodes}"
    if options.local_addr is not None:
        return f"on the node at {options.local_addr}, one of {options.nnodes}"
    return f"on each of {options.nnodes} nodes"


def start(options: Options, processes: int) -> int:
    """Run torchrun here, or on simulated nodes."""
    from fp8lm.launch.agent import run_agent
    from fp8lm.launch.simulate import run_simulated

    if options.simulate:
        return run_simulated(options, processes, say)
    os.environ.update(torchrun_environment(options))
    return run_agent(torchrun_arguments(options, processes))


@contextmanager
def progress_line(text: str, after: float = PATIENCE) -> Iterator[None]:
    """Print `text` on stderr if the `with` block takes longer than `after` seconds.

    Only to a terminal: a log gains nothing from it.
    """
    timer = threading.Timer(after, complain, [text])
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
