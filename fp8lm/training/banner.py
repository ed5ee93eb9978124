"""What a run says of itself at its start: model, machine, batch, folders."""

from __future__ import annotations

import torch

from fp8lm.config import Config
from fp8lm.kernels.select import describe_kernels
from fp8lm.training.build import Run
from fp8lm.training.flops import Peak
from fp8lm.training.memory import describe_state, linear_weights


def banner(run: Run, num_parameters: int, peak: Peak | None) -> list[str]:
    """A few lines; `num_parameters` of the whole model, `peak` of the GPU, if it is known."""
    config, groups = run.config, run.groups
    model, batch = config.model, config.train.global_batch_size
    sizes = {
        "TP": groups.tensor_parallel.size(),
        "PP": groups.pipeline_parallel.size(),
        "DP": groups.data_parallel.size(),
    }
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return [
        f" model: {num_parameters:,} parameters in all ({model.num_layers} layers of "
        f"{model.hidden_size}), precision {config.precision.preset}",
        f" device: {groups.world.size()} x {_describe_device(run.device)} ({layout}); kernels: "
        f"{describe_kernels(run.device)}",
        f" step: {batch} sequences of {model.seq_length} = {batch * model.seq_length:,} tokens",
        f" folders: {_describe_folders(config)}",
        describe_state(run.optimizer, linear_weights(run.weights)),
        *([] if peak is None else [f" MFU is the share of {peak}"]),
    ]


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU process of {threads} thread{'s' * (threads > 1)}"


def _describe_folders(config: Config) -> str:
    folders = {
        "checkpoint.save": config.checkpoint.save,
        "checkpoint.load": config.checkpoint.load,
        "logging.dir": config.logging.dir,
    }
    return ", ".join(f"{key}={folder or 'null'}" for key, folder in folders.items())
