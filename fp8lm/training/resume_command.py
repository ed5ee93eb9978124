"""How a run that has ended early goes on, and what of it is lost."""

from __future__ import annotations

import shlex
import sys

from fp8lm.checkpoint import latest_iteration
from fp8lm.comm.env import DistEnv
from fp8lm.config import CheckpointConfig
from fp8lm.runtime.errors import InputError


def describe_interruption(config: CheckpointConfig, launch: DistEnv, iteration: int) -> str:
    """For a run that ends after `iteration` without saving."""
    if config.save is None:
        return f"after iteration {iteration}; nothing is saved without checkpoint.save"
    try:
        saved = latest_iteration(config.save)
    except (InputError, OSError):
        saved = None
    if saved is None:
        return f"after iteration {iteration}; there is no checkpoint in {config.save} yet"
    lost = max(0, iteration - saved)
    return (
        f"after iteration {iteration}; the last checkpoint is of iteration {saved} in "
        f"{config.save} ({lost} iteration{'s' * (lost != 1)} lost); to go on: "
        f"{command_to_go_on(config, launch)}"
    )


def command_to_go_on(config: CheckpointConfig, launch: DistEnv) -> str:
    """The command that starts from what this one has saved in `config.save`."""
    more = [] if config.resumes else [f"checkpoint.load={config.save}"]
    if launch.by_launcher:  # which was given its own command line
        return " with ".join(["the same command", *more])
    return shlex.join([*sys.orig_argv, *more])
