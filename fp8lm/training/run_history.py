"""starts.jsonl: with which code and versions a run was started, one line for every start.

A long run is started many times, and not always from the same commit: the lines say which code ran
which iterations.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fp8lm
from fp8lm.config import Config
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import make_folder, open_to_append
from fp8lm.runtime.revision import source_revision

NAME = "starts.jsonl"


def start_facts() -> dict[str, Any]:
    """Versions and revision of what runs in this process."""
    versions = {
        "fp8lm": fp8lm.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which YAML does not know
        "megatron-core": version("megatron-core"),
    }
    return {"versions": versions, "git": asdict(source_revision())}


def write_start(config: Config, facts: dict[str, Any], iteration: int, processes: int) -> None:
    """Leave config.yaml and a line of a start in `logging.dir`; `InputError` if that fails."""
    if config.logging.dir is None:
        return
    folder = Path(config.logging.dir)
    try:
        make_folder(folder)
        config.save_yaml(folder / "config.yaml")
        record_start(folder, facts, iteration, processes)
    except OSError as error:
        raise InputError(f"logging.dir={folder} cannot be written to: {error.strerror}") from error


def record_start(folder: Path, facts: dict[str, Any], iteration: int, processes: int) -> None:
    """Append a line for a start at `iteration`, with the `facts` of it; OSError if it cannot."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"time": now, "iteration": iteration, "processes": processes, **facts}
    with open_to_append(folder / NAME) as file:
        file.write(f"{json.dumps(line)}\n".encode())
