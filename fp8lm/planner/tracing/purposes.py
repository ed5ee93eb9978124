"""What an operation is for, from where it is called.

In forward, and in the backward of the project's own autograd functions, the Python stack says it: a
module that owns all that happens below it (`OWNERS`), or else the innermost place that is listed
(`METHODS`, `PLACES`). PyTorch's autograd nodes have no such stack. They carry the sequence number
that the forward operation was given, by which its purpose is looked up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FrameType

import torch
from torch.autograd.function import BackwardCFunction

AMAX, CAST, TRANSPOSE, DECODE = "amax", "cast", "transpose", "decode"
SCALE, ACCUMULATE = "scale arithmetic", "accumulate"
GEMM, ATTENTION, NORM, ACTIVATION = "gemm", "attention", "norm", "activation"
ROPE, BIAS, DROPOUT, RESIDUAL = "rope", "bias", "dropout", "residual"
EMBEDDING, LOSS = "embedding", "loss"
COMMUNICATION, REDUCTION = "communication", "gradient reduction"
OPTIMIZER, OTHER = "optimizer", "other"
PURPOSES = (
    *(GEMM, ATTENTION, ACCUMULATE, CAST, AMAX, TRANSPOSE, DECODE, SCALE, NORM, ACTIVATION, ROPE),
    *(BIAS, DROPOUT, RESIDUAL, COMMUNICATION, EMBEDDING, LOSS, REDUCTION, OPTIMIZER, OTHER),
)

_PACKAGE = "fp8lm."
_OBSERVES = ("fp8lm.kernels.cost", "fp8lm.planner.tracing.")  # and calls no operation itself
# The outermost of these owns an operation: the bytes of a cast before sending are communication's.
OWNERS = {
    "optim": OPTIMIZER,
    "kernels.adam": OPTIMIZER,
    "gradient": REDUCTION,
    "parallel.param_buffer": REDUCTION,
    "parallel.tensor_parallel": COMMUNICATION,
    "parallel.query_groups": COMMUNICATION,
    "comm": COMMUNICATION,
    "layers.main_grad": ACCUMULATE,
    "layers.embedding": EMBEDDING,
    "layers.cross_entropy": LOSS,
    "model.objectives": LOSS,
    "model.preference": LOSS,
}
# The innermost of these has it: methods of the interface of kernels, else modules.
METHODS = {
    "amax": AMAX,
    "partial_amaxes": AMAX,
    "cast": CAST,
    "quantize": CAST,
    "quantize_with_transpose": CAST,
    "column_sums": BIAS,
    "dequantize": DECODE,
    "transpose": TRANSPOSE,
    "gemm": GEMM,
    "attention": ATTENTION,
    "document_mask": ATTENTION,
    "rope": ROPE,
    "rope_backward": ROPE,
    "norm": NORM,
    "norm_backward": NORM,
    "gelu": ACTIVATION,
    "gelu_backward": ACTIVATION,
    "swiglu": ACTIVATION,
    "swiglu_backward": ACTIVATION,
    "accumulate_": ACCUMULATE,
    "quantize_into": COMMUNICATION,
    "join": COMMUNICATION,
    "sum_in_order": COMMUNICATION,
}
PLACES = {
    "numerics.scaling": SCALE,
    "layers.norm": NORM,
    "layers.activation": ACTIVATION,
    "layers.dropout": DROPOUT,
    "model.rope": ROPE,
    "model.attention": ROPE,  # the split of the projection into q, k and v
    "model.decoder": RESIDUAL,
    "layers.linear": BIAS,
    "model.gpt": EMBEDDING,
    "parallel.pipeline": LOSS,  # divided by the number of micro-batches
    "parallel.data_parallel": OPTIMIZER,
    "layers.weight_operands": SCALE,
    "training.step": OPTIMIZER,  # the step's scalars
}
_OF_BIAS = ("sum", "add_", "add_rows")  # operations of `layers.linear`, and sums for it
_SCALAR_PARTS = (AMAX, CAST, DECODE, GEMM, OTHER)  # single numbers there are scales and amaxes


@dataclass(frozen=True)
class Site:
    """Where an operation is called: for what, and whether by a micro-batch or once a step."""

    purpose: str
    in_microbatch: bool


class CallSites:
    """Finds the `Site` of an operation while it runs; remembers those of the forward."""

    def __init__(self) -> None:
        self._of_node: dict[int, str] = {}

    def locate(self, name: str, *, is_scalar: bool) -> Site:
        """The site of the operation `name`, which the calling stack runs."""
        stack = _segments(sys._getframe(1))  # noqa: SLF001 (traceback is 50 times slower)
        # What the engine calls, and not what called it: all of a backward is called in one place.
        called = next(filter(None, stack[:-1]), []) if len(stack) > 1 else stack[0]
        purpose = _purpose(tuple(called))
        if purpose is None:
            purpose = self._of_autograd(name)
        else:
            # The node of an operation is made just before it runs; later ones find it listed.
            number = torch._C._autograd._get_sequence_nr() - 1  # noqa: SLF001
            self._of_node.setdefault(number, purpose)
        if is_scalar and purpose in _SCALAR_PARTS:
            purpose = SCALE
        elif purpose == GEMM and name == "add_":
            purpose = BIAS  # that the matrix product does not take itself
        elif purpose == BIAS and name not in _OF_BIAS:
            purpose = OTHER
        modules = {module for segment in stack for module, _ in segment}
        return Site(purpose, "parallel.pipeline" in modules and purpose != REDUCTION)

    def _of_autograd(self, name: str) -> str:
        """The purpose of an operation that the engine runs by itself."""
        node = torch._C._current_autograd_node()  # noqa: SLF001
        if node is None:
            return OTHER
        if isinstance(node, BackwardCFunction) and name in ("add", "add_"):
            return RESIDUAL  # the sum of gradients of what a layer and its residual path read
        return self._of_node.get(node._sequence_nr(), OTHER)  # noqa: SLF001


Place = tuple[str, str]  # module within the package, function


def _segments(frame: FrameType | None) -> list[list[Place]]:
    """The package's frames from the innermost on, cut where autograd's engine has been called."""
    segments: list[list[Place]] = [[]]
    for module, function in _frames(frame):
        part = _part_of_package(module)
        if part is not None:
            segments[-1].append((part, function))
        elif function == "_engine_run_backward":
            segments.append([])
    return segments


@cache  # asked of every frame of every operation
def _part_of_package(module: str) -> str | None:
    """The name within the package of a module that runs operations."""
    if module.startswith(_PACKAGE) and not module.startswith(_OBSERVES):
        return module.removeprefix(_PACKAGE)
    return None


def _frames(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back


@cache
def _purpose(places: tuple[Place, ...]) -> str | None:
    """None where no frame of the package is in the stack."""
    for module, _ in reversed(places):
        for owner, purpose in OWNERS.items():
            if f"{module}.".startswith(f"{owner}."):
                return purpose
    for module, function in places:
        if module.startswith("kernels.") and function in METHODS:
            return METHODS[function]
        if module in PLACES:
            return PLACES[module]
    return OTHER if places else None
