"""The training command: pretrain_gpt.py, `fp8lm-train`, `python -m fp8lm.pretrain`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NoReturn

from fp8lm.runtime.ending import exit_at_second_signal, exit_with
from fp8lm.runtime.errors import EXIT_RESTART
from fp8lm.runtime.launchers import adopt_launcher
from fp8lm.runtime.parent_death import tie_to_parent


def main(argv: list[str]) -> int:
    """Read the config, build the run, train it; the exit code."""
    from fp8lm.config import parse_command_line  # inside, so that a missing package is reported

    config = parse_command_line(argv)
    # Imported once the config is known to be good: `--help` and mistakes answer at once.
    from fp8lm.comm.env import DistEnv
    from fp8lm.comm.groups import process_groups, rank_device
    from fp8lm.evaluation.hook import check_installed, task_hooks
    from fp8lm.training.build import build
    from fp8lm.training.builders import resolve_device
    from fp8lm.training.hooks import build_trainer
    from fp8lm.training.run_folders import locked_folders
    from fp8lm.training.stopping import is_over

    check_installed(config.train)
    adopt_launcher(os.environ)
    resumes = config.checkpoint.resumes
    if resumes and is_over(config.train, DistEnv.from_environment(os.environ)):
        return EXIT_RESTART  # torchrun has restarted a run that saved and stopped
    device = rank_device(resolve_device(config.train.device))
    parallel = config.parallel
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    with process_groups(device, parallel, timeout=timeout) as groups:
        run = build(config, groups, device)
        hooks = task_hooks(config.train, groups)
        with locked_folders(config, groups) as locks:
            trainer = build_trainer(run, locks, hooks)
            trainer.load()
            return trainer.train()


def command() -> NoReturn:
    """Entry point: run `main` and end the process."""
    tie_to_parent()
    exit_at_second_signal()
    exit_with(main)


if __name__ == "__main__":
    command()
