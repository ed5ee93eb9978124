"""The memory that a traced step holds, from the lifetimes of its tensors.

A tensor of the meta device has a storage without memory, which Python frees when the last tensor
that uses it is gone, as PyTorch's allocator does on a GPU. So the bytes of all storages that are
alive are those that a GPU would have allocated, rounding to blocks and fragmentation left out.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fp8lm.planner.tracing.purposes import LOSS

LOGITS = "logits"
AT_HEAD = (LOGITS, LOSS)  # purposes of what only a stage with the head holds


class Kind(NamedTuple):
    """What a tensor was made for, and its type as it is stored: `("norm", "bfloat16")`."""

    purpose: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.purpose} ({self.dtype})"


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside weights, gradients and optimizer states.

    `saved` is held from a micro-batch's forward to its backward, by kind. `peak` is the most within
    a micro-batch, `peak_in_layers` the most while there are no logits, `peak_once` the most in the
    rest of the step.
    """

    saved: Mapping[Kind, float] = field(default_factory=dict)
    peak: float = 0
    peak_in_layers: float = 0
    peak_once: float = 0

    @property
    def saved_in_layers(self) -> float:
        """`saved` without what belongs to the head."""
        return sum(self.saved.values()) - self.saved_at_head

    @property
    def saved_at_head(self) -> float:
        """What of `saved` belongs to the head."""
        return sum(size for kind, size in self.saved.items() if kind.purpose in AT_HEAD)

    def __add__(self, other: StepMemory) -> StepMemory:
        kinds = dict.fromkeys((*self.saved, *other.saved))
        saved = {kind: self.saved.get(kind, 0) + other.saved.get(kind, 0) for kind in kinds}
        return StepMemory(
            {kind: size for kind, size in saved.items() if size},
            self.peak + other.peak,
            self.peak_in_layers + other.peak_in_layers,
            self.peak_once + other.peak_once,
        )

    def times(self, factor: float) -> StepMemory:
        """Everything `factor` times."""
        return StepMemory(
            {kind: factor * size for kind, size in self.saved.items()},
            factor * self.peak,
            factor * self.peak_in_layers,
            factor * self.peak_once,
        )

    def __sub__(self, other: StepMemory) -> StepMemory:
        return self + other.times(-1)


class LiveMemory:
    """Follows the storages of tensors that it is shown; those of `state` do not count.

    A tensor whose last dimension is `vocabulary`, a width that no other has, is made of logits.
    """

    def __init__(self, state: Iterable[Tensor], vocabulary: int) -> None:
        self._known = WeakIdKeyDictionary()
        for tensor in state:
            self._known[tensor.untyped_storage()] = True
        self._vocabulary = vocabulary
        self._live: Counter[Kind] = Counter()
        self._total = self._logits = 0
        self._saved: dict[Kind, float] = {}
        self._peak = self._peak_in_layers = self._peak_once = 0

    def see(self, tensor: Tensor, purpose: str, *, in_microbatch: bool) -> None:
        """`tensor` is the result of an operation for `purpose`."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            purpose = LOGITS
        kind, size = Kind(purpose, str(tensor.dtype).removeprefix("torch.")), storage.nbytes()
        self._count(kind, size)
        weakref.finalize(storage, self._count, kind, -size)
        if not in_microbatch:
            self._peak_once = max(self._peak_once, self._total)
            return
        self._peak = max(self._peak, self._total)
        if not self._logits:
            self._peak_in_layers = max(self._peak_in_layers, self._total)

    def begin_backward(self) -> None:
        """The forward of a micro-batch is over."""
        self._saved = {kind: size for kind, size in self._live.items() if size}

    @property
    def of_step(self) -> StepMemory:
        """What has been seen."""
        return StepMemory(self._saved, self._peak, self._peak_in_layers, self._peak_once)

    def _count(self, kind: Kind, size: int) -> None:
        self._live[kind] += size
        self._total += size
        if kind.purpose == LOGITS:
            self._logits += size
