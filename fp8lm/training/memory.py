"""How much memory a run takes: its state byte for byte, and the process as a whole."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

from fp8lm.layers.param import Param, QuantizedParam
from fp8lm.optim import AdamW


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes now and at the peak: `memory/rss` of the process, `memory/gpu` of tensors on a GPU."""
    # Linux reports the peak in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    now = psutil.Process().memory_info().rss
    # The kernel counts both lazily: the peak can be read a few pages behind.
    peak = max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    report = {"memory/rss": now, "memory/rss_peak": peak}
    if device.type == "cuda":
        report["memory/gpu"] = torch.cuda.memory_allocated(device)
        report["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return report


def state_bytes(
    optimizer: AdamW, names: list[str] | None = None, padding: int = 0
) -> dict[str, int]:
    """Bytes this process holds for its weights (all, or those in `names`), by kind.

    Counted from the buffers themselves, scales included, but for `operands`: what
    `precision.cache_weight_operands` adds while a step lasts. `padding`: what the buffers of
    weights have beyond these (see `NoDataParallel.padding`).
    """
    names = list(optimizer.weights) if names is None else names
    weights = [optimizer.weights[name] for name in names]
    states = [optimizer.states[name] for name in names if name in optimizer.states]
    return {
        "weights": sum(weight.model_param.nbytes for weight in weights) + padding,
        "grads": sum(weight.main_grad.value.nbytes for weight in weights),
        "master": sum(state.master.nbytes for state in states if state.owns_master),
        "exp_avg": sum(state.exp_avg.nbytes for state in states),
        "exp_avg_sq": sum(state.exp_avg_sq.nbytes for state in states),
        "operands": sum(w.operand_bytes for w in weights if isinstance(w, QuantizedParam)),
    }


def linear_weights(weights: dict[str, Param]) -> list[str]:
    """Names of the matrices of linear layers, which the low-precision formats are for."""
    return [
        name
        for name, weight in weights.items()
        if isinstance(weight, QuantizedParam) and not weight.spec.keep_high_precision
    ]


def bytes_per_parameter(optimizer: AdamW, names: list[str], padding: int = 0) -> float:
    """Bytes of state this process holds for each parameter of the weights in `names`."""
    return sum(state_bytes(optimizer, names, padding).values()) / _count(optimizer, names)


def describe_state(optimizer: AdamW, names: list[str]) -> str:
    """One line: bytes of state per parameter of the weights in `names`, by kind."""
    count = _count(optimizer, names)
    parts = ", ".join(
        f"{kind} {size / count:.2f}" for kind, size in state_bytes(optimizer, names).items()
    )
    total = bytes_per_parameter(optimizer, names)
    return (
        f" linear layers: {count:,} parameters on this rank, {total:.2f} bytes of state each "
        f"({parts})"
    )


def _count(optimizer: AdamW, names: list[str]) -> int:
    return sum(optimizer.weights[name].spec.numel for name in names)
