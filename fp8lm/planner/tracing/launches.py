"""The launches of an operation of PyTorch: how often it starts a kernel, and what each one moves.

An operation is one kernel that reads every tensor it is given once and writes every tensor it
returns or changes once; a tensor that it changes in place is read as well. Views and empty tensors
cost nothing, and an expanded dimension is read once. The operations for which this is not so are in
`_SEVERAL` and `_INDEXED`, as PyTorch's CUDA sources have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

Unit = str  # what computes the flops: one of `UNITS`
UNITS = ("bf16", "fp8", "fp32", "attention_forward", "attention_backward")
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")
_OVERWRITE = ("copy_", "fill_", "zero_")
_UNIT_OF = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Launch:
    """One kernel: bytes of device memory read and written, flops and the unit that does them."""

    name: str
    reads: int
    writes: int
    flops: int = 0
    unit: Unit | None = None
    declared: bool = False  # by the kernel's own launcher, not an operation of PyTorch

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.reads + self.writes


@dataclass(frozen=True)
class Operation:
    """An operation of PyTorch that has run: what it was given, what it changed and returned."""

    name: str
    inputs: Sequence[Tensor]
    changed: Sequence[Tensor]
    results: Sequence[Tensor]
    arguments: Sequence[Any]
    is_view: bool
    writes_only: bool

    @classmethod
    def of(cls, func: OpOverload, args: Sequence[Any], kwargs: dict, result: Any) -> Operation:
        """`func` called with `args` and `kwargs`, on tensors of the meta device."""
        schema = func._schema  # noqa: SLF001 (torch has no public one)
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        inputs: list[Tensor] = []
        changed: list[Tensor] = []
        for argument in schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            (changed if is_written else inputs).extend(_tensors(named.get(argument.name)))
        name = schema.name.partition("::")[2]
        is_out = any(a.is_out for a in schema.arguments)
        given = {id(tensor) for tensor in (*inputs, *changed)}
        return cls(
            name=name,
            inputs=_distinct(inputs),
            changed=_distinct(changed),
            results=[tensor for tensor in _tensors(result) if id(tensor) not in given],
            arguments=list(args),
            is_view=func.is_view,
            writes_only=is_out or name in _OVERWRITE,
        )

    @property
    def is_scalar(self) -> bool:
        """Whether it touches single numbers only."""
        touched = (*self.inputs, *self.changed, *self.results)
        return all(tensor.numel() == 1 for tensor in touched)

    def launches(self) -> list[Launch]:
        """The kernels that it starts on a GPU; none for a view or for memory without content."""
        if self.is_view or self.name in _FREE:
            return []
        written = _bytes(self.changed) + _bytes(self.results)
        read = _bytes(self.inputs) + (0 if self.writes_only else _bytes(self.changed))
        if not written:  # no elements: PyTorch starts no kernel
            return []
        if self.name in _SEVERAL:
            return list(_SEVERAL[self.name](self))
        if self.name in _INDEXED:
            read, written = _INDEXED[self.name](self)
        flops, unit = _arithmetic(self)
        return [Launch(self.name, read, written, flops, unit)]


def _tensors(value: Any) -> list[Tensor]:
    """Tensors on the meta device within `value`; those on the CPU are Python's numbers."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_meta]


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of memory under `tensors`: an expanded dimension has one element."""
    total = 0
    for tensor in tensors:
        numel = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numel *= size if stride or not size else 1
        total += numel * tensor.element_size()
    return total


def _arithmetic(operation: Operation) -> tuple[int, Unit | None]:
    """Flops of a matrix product or of causal attention, and who does them."""
    name, inputs = operation.name, operation.arguments
    if name in ("mm", "_scaled_mm", "_scaled_mm_v2", "addmm", "bmm"):
        a, b = inputs[1:3] if name == "addmm" else inputs[:2]
        unit = "fp8" if name.startswith("_scaled_mm") else _UNIT_OF[a.dtype]
        return 2 * a.numel() * b.shape[-1], unit
    if "scaled_dot_product" in name:
        is_backward = name.endswith("_backward")
        q, k = inputs[1:3] if is_backward else inputs[:2]
        # Two products of 2 q.numel() S flops, half of them masked; five in backward.
        forward = 2 * q.numel() * k.shape[2]
        if is_backward:
            return forward * 5 // 2, "attention_backward"
        return forward, "attention_forward"
    return 0, None


def _two_passes(operation: Operation) -> Iterator[Launch]:
    """Copy the first input, then change some of the copy: all is read and written again."""
    source, result = _bytes(operation.inputs[:1]), _bytes(operation.results)
    yield Launch("clone", source, result)
    others = _bytes(operation.inputs[1:])
    yield Launch(f"{operation.name}_", others + result, result)


def _zeros_and_part(operation: Operation) -> Iterator[Launch]:
    """The gradient of a slice: zeros, into which the given gradient is copied."""
    part = _bytes(operation.inputs)
    yield Launch("zero_", 0, _bytes(operation.results))
    yield Launch("copy_", part, part)


def _loss_gradient(operation: Operation) -> Iterator[Launch]:
    """One element of every row gets a gradient, the others are zeros."""
    gradient, _, labels = operation.inputs[:3]
    yield Launch("zero_", 0, _bytes(operation.results))
    touched = labels.numel() * gradient.element_size()
    yield Launch(operation.name, touched + _bytes([labels]), touched)


def _norm_gradients(operation: Operation) -> Iterator[Launch]:
    """One kernel for the gradient of the input, one for those of weight and bias."""
    read = _bytes(operation.inputs)
    for results in (operation.results[:1], operation.results[1:]):
        yield Launch(operation.name, read, _bytes(results))


def _sorted_and_added(operation: Operation) -> Iterator[Launch]:
    """Sorts the indices, by which one kernel adds the values: radix sort reads a byte at a time."""
    indices = _bytes([t for t in operation.inputs if not t.is_floating_point()])
    for _ in range(_SORTING):
        yield Launch("sort", 2 * indices, 2 * indices)
    values = _bytes([t for t in operation.inputs if t.is_floating_point()])
    yield Launch(operation.name, 2 * indices + 2 * values, values)


_SORTING = 8  # of 64-bit indices, each with its place


_SEVERAL: dict[str, Callable[[Operation], Iterator[Launch]]] = {
    "masked_fill": _two_passes,
    "slice_backward": _zeros_and_part,
    "index_put_": _sorted_and_added,
    "select_backward": _zeros_and_part,
    "nll_loss_backward": _loss_gradient,
    "native_layer_norm_backward": _norm_gradients,
}


def _taken(operation: Operation) -> tuple[int, int]:
    """Reads the elements that it returns, and the indices."""
    result = _bytes(operation.results)
    indices = [t for t in operation.inputs if not t.is_floating_point()]
    return result + _bytes(indices), result


def _added(operation: Operation) -> tuple[int, int]:
    """Adds the source to as many elements of the changed tensor."""
    source = operation.inputs[-1].numel() * operation.changed[0].element_size()
    return _bytes(operation.inputs) + source, source


def _placed(operation: Operation) -> tuple[int, int]:
    """Writes the source to as many elements of the changed tensor."""
    source = operation.inputs[-1].numel() * operation.changed[0].element_size()
    return _bytes(operation.inputs), source


def _picked_loss(operation: Operation) -> tuple[int, int]:
    """Reads one element of every row."""
    logits, labels = operation.inputs[:2]
    read = labels.numel() * logits.element_size() + _bytes([labels])
    return read, _bytes(operation.results)


_INDEXED: dict[str, Callable[[Operation], tuple[int, int]]] = {
    "embedding": _taken,
    "index_select": _taken,
    "gather": _taken,
    "index_add_": _added,
    "scatter_add_": _added,
    "index_copy_": _placed,
    "nll_loss_forward": _picked_loss,
}
