"""Check a run, and start or describe it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fp8lm.config import load_config
from fp8lm.launch.command import command_line, torchrun_arguments, torchrun_environment
from fp8lm.launch.options import Options, parse_options

if TYPE_CHECKING:
    from fp8lm.inspect.plan import Plan


def main(argv: Sequence[str]) -> int:
    """Start what the command line describes; the exit code of the job (see `agent`)."""
    options = parse_options(argv)
    config = load_config(options.config, options.overrides)
    # Imported once the config is known to be good: `--help` and mistakes answer at once.
    from fp8lm.launch import preflight

    processes = options.nproc_per_node or preflight.default_processes(config)
    plan = preflight.check_run(config, options.nnodes, processes)
    remarks = preflight.notes(config, processes, options.max_restarts)
    if options.dry_run:
        print(describe(options, plan, processes, remarks))
        return 0
    preflight.check_devices(config, processes)
    preflight.check_log_folder(options.log_dir)
    if options.simulate:
        preflight.check_simulation(config)
    elif options.nnodes > 1:
        preflight.check_meeting(options.rdzv_endpoint)
    if options.node_rank in (None, 0):
        say(f" {plan.summary()[0]}")
        for remark in remarks:
            say(f" note: {remark}")
    return start(options, processes)


def describe(options: Options, plan: Plan, processes: int, remarks: Sequence[str]) -> str:
    """What `--dry-run` prints."""
    environment = torchrun_environment(options)
    command = command_line(environment, torchrun_arguments(options, processes))
    where = f"on each of {options.nnodes} nodes" if options.nnodes > 1 else "here"
    if options.simulate:
        where += ", all of them here"
    lines = [*plan.summary(), "", *plan.table(options.all_ranks), "", f"command {where}:", command]
    return "\n".join([*lines, *(f"note: {remark}" for remark in remarks)])


def start(options: Options, processes: int) -> int:
    """Run torchrun here, or on simulated nodes."""
    from fp8lm.launch.agent import run_agent
    from fp8lm.launch.simulate import simulate

    if options.simulate:
        return simulate(options, processes, say)
    os.environ.update(torchrun_environment(options))
    return run_agent(torchrun_arguments(options, processes))


def say(line: str) -> None:
    """To the terminal at once: what is started writes there too."""
    print(line, flush=True)
