"""`Shard`, a rank's block of a logical tensor: the unit of saving and loading."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """The block of a tensor of shape `global_shape` that starts at `offset`, in elements.

    Several ranks may hold the same block; together they must hold every element. Raises
    `ValueError` for a block that does not lie inside the tensor.
    """

    tensor: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    def __post_init__(self) -> None:
        dims = (len(self.global_shape), len(self.offset), self.tensor.ndim)
        ends = map(sum, zip(self.offset, self.tensor.shape, strict=False))
        inside = all(end <= size for end, size in zip(ends, self.global_shape, strict=False))
        if len(set(dims)) > 1 or any(start < 0 for start in self.offset) or not inside:
            raise ValueError(
                f"a block of shape {tuple(self.tensor.shape)} at {tuple(self.offset)} does not "
                f"lie inside a tensor of shape {tuple(self.global_shape)}"
            )

    @classmethod
    def whole(cls, tensor: Tensor) -> Shard:
        """All of `tensor`."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.ndim)

    @property
    def is_empty(self) -> bool:
        """Whether the block holds no element of a tensor that has some."""
        return self.tensor.numel() == 0 and math.prod(self.global_shape) > 0
