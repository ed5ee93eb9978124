"""`GraphCapture` on a CPU: operations are written down, and replayed as a CUDA graph would.

A replay runs the operations of the capture on the memory and with the numbers that they had then,
and calls no Python in between. What cannot be captured on a GPU fails here too: a number that the
host reads, a tensor whose shape depends on values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The host reads a value, or a shape depends on one.
WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select")
# Memory alone: a graph has no launch for it.
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass(frozen=True)
class Operation:
    """A call of a PyTorch operator, and its results."""

    function: object
    args: tuple
    kwargs: dict
    result: object

    @property
    def name(self):
        return self.function._schema.name.partition("::")[2]  # noqa: SLF001 (no public one)

    def replay(self):
        """Call it again; its results go where they were."""
        again = self.function(*self.args, **self.kwargs)
        for work in works_of(again):
            work.wait()
        for before, now in zip(tensors_of(self.result), tensors_of(again), strict=True):
            if memory(before) != memory(now):
                before.copy_(now)

    def numbers(self):
        """What a replay repeats and is no tensor; as text, since NaN is not equal to itself."""
        leaves = tree_leaves((self.args, self.kwargs))
        return self.name, [repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]


@dataclass
class Capture:
    """What one call of `capture` has written down."""

    operations: list[Operation] = field(default_factory=list)
    made: set[int] = field(default_factory=set)  # memory that the operations have allocated
    # Keeps it, used or not: what others allocate later is not at an address of `made`.
    kept: list[Tensor] = field(default_factory=list)

    def replay(self):
        for operation in self.operations:
            operation.replay()

    @property
    def reads(self):
        """The memory of others that the operations read or write, in their order."""
        tensors = [x for op in self.operations for x in tensors_of((op.args, op.kwargs))]
        return list(dict.fromkeys(memory(x) for x in tensors if memory(x) not in self.made))


class LiteralReplay:
    """`GraphCapture` that keeps its `captures`, and counts their `replays`."""

    def __init__(self):
        self.captures, self.pools, self.replays, self.runs = [], [], 0, 0

    def run(self, work):
        self.runs += 1
        return work()

    def pool(self):
        return object()

    def capture(self, work, pool):
        capture, changed = Capture(), Changes()
        with Recorder(capture, changed):
            result = work()
        changed.undo()
        spoil(capture)
        self.captures.append(capture)
        self.pools.append(pool)

        @torch.no_grad()
        def replay():
            self.replays += 1
            capture.replay()

        return replay, result


class Changes:
    """The contents, before, of memory that a capture has written to, which on a GPU it has not."""

    def __init__(self):
        self._before = {}

    def before(self, tensor):
        if memory(tensor) not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before[memory(tensor)] = whole, whole.clone()

    def undo(self):
        for whole, contents in self._before.values():
            whole.copy_(contents)


class Recorder(TorchDispatchMode):
    def __init__(self, capture, changes):
        super().__init__()
        self.capture, self.changes = capture, changes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema  # noqa: SLF001
        name = schema.name.partition("::")[2]
        if name in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        given = {memory(x) for x in tensors_of((args, kwargs))}
        if schema.is_mutable:
            with torch.utils._python_dispatch._disable_current_modes():  # noqa: SLF001
                for x in tensors_of((args, kwargs)):
                    if memory(x) not in self.capture.made:
                        self.changes.before(x)
        result = function(*args, **kwargs)
        if name not in ALLOCATING:
            self.capture.operations.append(Operation(function, args, kwargs, result))
        self.capture.made |= {memory(x) for x in tensors_of(result)} - given
        self.capture.kept += tensors_of(result)
        return result


def spoil(capture):
    """Leave nothing of what the capture has computed: on a GPU it has computed nothing."""
    for tensor in [x for op in capture.operations for x in tensors_of(op.result)]:
        if memory(tensor) in capture.made:
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def works_of(tree):
    """The handles of collectives."""
    return [leaf for leaf in tree_leaves(tree) if hasattr(leaf, "wait")]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()
