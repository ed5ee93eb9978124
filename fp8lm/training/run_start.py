"""The start of a run: banner, config.yaml and starts.jsonl.

A long run is started many times, and not always from the same commit: a line of starts.jsonl for
every start says with which code and versions it ran which iterations.
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
from fp8lm.data.packed_examples import PackedExamples
from fp8lm.kernels.select import describe_attention, describe_kernels
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import make_folder, open_to_append
from fp8lm.runtime.revision import source_revision
from fp8lm.training.build import Run
from fp8lm.training.flops import Peak, small_gemm_risk
from fp8lm.training.memory import describe_state, linear_weights
from fp8lm.training.run_length import accumulation_risks

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
    """Write config.yaml and a line of starts.jsonl to `logging.dir`; `InputError` if that fails."""
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


def banner(run: Run, num_parameters: int, peak: Peak | None) -> list[str]:
    """A few lines; `num_parameters` of the whole model, `peak` of the GPU, if it is known."""
    config, groups = run.config, run.groups
    model, batch = config.model, config.train.global_batch_size
    dims = groups.dims
    layout = f"TP {dims.tp}, PP {dims.pp}, DP {dims.dp}"
    return [
        f" model: {num_parameters:,} parameters in all ({model.num_layers} layers of "
        f"{model.hidden_size}), precision {config.precision.preset}",
        f" device: {groups.world.size()} x {_describe_device(run.device)} ({layout}); kernels: "
        f"{describe_kernels(run.device, config.precision.kernels)}",
        f" step: {batch} sequences of {model.seq_length} = {batch * model.seq_length:,} tokens",
        *_describe_documents(config, run.device),
        *(f" {line}" for line in _describe_examples(run)),
        f" folders: {_describe_folders(config)}",
        describe_state(linear_weights(run.weights), run.optimizer.states),
        *(f" warning: {risk}" for risk in _risks(run)),
        *([] if peak is None else [f" MFU is the share of {peak}"]),
    ]


def _risks(run: Run) -> list[str]:
    risks = accumulation_risks(run.config, run.groups.dims.dp)
    small = small_gemm_risk(run.config) if run.device.type == "cuda" else None
    return risks if small is None else [*risks, small]


def _describe_examples(run: Run) -> list[str]:
    """What tuning reads of each split."""
    splits = [split for split in run.datasets if isinstance(split, PackedExamples)]
    warnings = [f"warning: {line}" for line in (splits[0].warnings() if splits else ())]
    return [*(split.describe() for split in splits), *warnings]


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU process of {threads} thread{'s' * (threads > 1)}"


def _describe_documents(config: Config, device: torch.device) -> list[str]:
    """A line where documents in a sample are kept apart."""
    keys = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    given = [f"data.{key}" for key in keys if getattr(config.data, key)]
    given += ["tuning.packing"] * (config.separates_documents and not given)
    if not config.separates_documents:
        return [f" documents: {', '.join(given)}"] if given else []
    return [
        f" documents: {', '.join(given)}; attention: "
        f"{describe_attention(device, config.precision.kernels)}; FLOPs are counted as if each "
        "sample were one document"
    ]


def _describe_folders(config: Config) -> str:
    folders = {
        "checkpoint.save": config.checkpoint.save,
        "checkpoint.load": config.checkpoint.load,
        "logging.dir": config.logging.dir,
    }
    if config.checkpoint.pretrained is not None:
        folders["checkpoint.pretrained"] = config.checkpoint.pretrained
    return ", ".join(f"{key}={folder or 'null'}" for key, folder in folders.items())
