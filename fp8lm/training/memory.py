"""Memory of a run: bytes of state, and of the whole process."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fp8lm.layers.param import Param, QuantizedParam, trainable
from fp8lm.optim.states import AdamState


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


def live_tensor_bytes() -> int:
    """Bytes of the memory of all tensors that Python holds, each counted once.

    Slow: it collects garbage and looks at every object. On a GPU `memory_bytes` knows it, too.
    """
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # isinstance would ask proxies, which warn; fake tensors have sizes, but no memory.
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor):
            storage = thing.untyped_storage()
            with suppress(RuntimeError):  # other tensors of a compiler have none either
                storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)  # on the meta device
    return sum(storages.values())


def state_bytes(
    weights: Mapping[str, Param], states: Mapping[str, AdamState], padding: int = 0
) -> dict[str, int]:
    """Bytes this process holds for `weights`, by kind; `states` are the optimizer's, by weight.

    Counted from the buffers themselves, scales included, but for `operands`: copies of weights for
    their GEMMs, which are there while a step lasts. `padding`: bytes of parameter buffers beyond
    the weights (see `NoDataParallel.padding`). A frozen weight has neither gradient nor optimizer
    states.
    """
    held = [states[name] for name in weights if name in states]
    gradients = [weight.main_grad.value for weight in trainable(weights).values()]
    matrices = [weight for weight in weights.values() if isinstance(weight, QuantizedParam)]
    return {
        "weights": sum(weight.model_param.nbytes for weight in weights.values()) + padding,
        "grads": sum(gradient.nbytes for gradient in gradients),
        "master": sum(state.master.nbytes for state in held if state.owns_master),
        "exp_avg": sum(state.exp_avg.nbytes for state in held),
        "exp_avg_sq": sum(state.exp_avg_sq.nbytes for state in held),
        "operands": sum(matrix.operand_bytes for matrix in matrices),
    }


def linear_weights(weights: Mapping[str, Param]) -> dict[str, Param]:
    """The matrices of linear layers, which the low-precision formats are for."""
    return {
        name: weight
        for name, weight in weights.items()
        if isinstance(weight, QuantizedParam) and not weight.spec.keep_high_precision
    }


def bytes_per_parameter(
    weights: Mapping[str, Param], states: Mapping[str, AdamState], padding: int = 0
) -> float:
    """Bytes of state this process holds for each parameter of `weights`; see `state_bytes`."""
    return sum(state_bytes(weights, states, padding).values()) / num_elements(weights)


def describe_state(weights: Mapping[str, Param], states: Mapping[str, AdamState]) -> str:
    """One line: bytes of state per parameter of `weights`, by kind."""
    count = num_elements(weights)
    parts = ", ".join(
        f"{kind} {size / count:.2f}" for kind, size in state_bytes(weights, states).items()
    )
    total = bytes_per_parameter(weights, states)
    return (
        f" linear layers: {count:,} parameters on this rank, {total:.2f} bytes of state each "
        f"({parts})"
    )


def num_elements(weights: Mapping[str, Param]) -> int:
    """Parameters of which this process holds its part."""
    return sum(weight.spec.numel for weight in weights.values())
