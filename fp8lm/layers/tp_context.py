"""The tensor-parallel communication of a linear layer, at its input and at its output.

A `TPComm` is one of Megatron's conjugate mappings, with the cast that goes before it:

    gather   this rank's part of the sequence -> the whole sequence   (bytes, one shared scale)
    reduce   partial sums -> their sum, or this rank's part of it

At its input a layer gathers in forward and reduces in backward; at its output it reduces in
forward and gathers in backward. The base class communicates nothing: a layer on one rank, and the
side of a parallel layer whose features are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fp8lm.comm.handles import Handle
from fp8lm.layers.quantizer import Observer, Quantizer
from fp8lm.layers.shard_spec import ShardSpec
from fp8lm.scaled_tensor import ScaledTensor


class TPComm:
    """No communication."""

    gathers = False  # whether `gather` brings what other ranks hold
    reduces = False  # whether `reduce` adds what other ranks hold
    observer: Observer | None = None  # of the partial sums that `reduce` casts

    def wire_quantizer(self, operand: Quantizer, dtype: torch.dtype) -> Quantizer:
        """The quantizer of a tensor (of `dtype`) before it is sent and saved for backward.

        `operand` is the quantizer of the GEMM that reads it.
        """
        return operand

    def gather(self, x: ScaledTensor) -> Handle[ScaledTensor]:
        """[T/t, F] of every rank, as `wire_quantizer` made it -> [T, F]."""
        return Handle.done(x)

    def reduce(self, y: Tensor) -> Handle[Tensor]:
        """The sum over ranks of `y` [T, F] (or this rank's rows of it), in the dtype of `y`."""
        return Handle.done(y)


class TPContext:
    """The tensor-parallel group of a layer. The base class: one rank, nothing is sharded."""

    sequence_parallel = False

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1

    def shard(self, dim: int, num_sections: int = 1) -> ShardSpec:
        """This rank's part of a weight along `dim` (see `ShardSpec`)."""
        return ShardSpec(dim, num_sections)

    def replicated_side(self) -> TPComm:
        """The communication on the side of replicated or sequence-parallel activations."""
        return TPComm()

    def sharded_side(self) -> TPComm:
        """The communication on the side where features are sharded."""
        return TPComm()

    def gather_query_group(self, x_SBF: Tensor) -> Tensor:
        """Features of all ranks that share this one's query group, in rank order, [S,B,rF]."""
        return x_SBF

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the ranks (fp32, not negative; NaN wins)."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Values (fp32, any shape) of every rank, in rank order: [size, ...]."""
        return values[None]

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replace every fp32 tensor by its sum over the ranks, in one exchange."""


NO_TP = TPContext()
