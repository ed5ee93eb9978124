"""Tensor parallelism: the group and the communication of its linear layers (FP8-LM, section 2.3).

    layer    sequence parallel   input                  output
    column   yes                 SequenceParallelComm   none
             no                  TPAllReduceComm        none
    row      yes                 none                   SequenceParallelComm
             no                  none                   TPAllReduceComm

With sequence parallelism a rank holds T/t of T tokens between the layers: forward gathers their
E4M3 bytes before a column-parallel GEMM and reduce-scatters the partial sums of a row-parallel one;
backward mirrors it with E5M2 gradients. Without, activations are replicated and partial sums are
all-reduced. Bytes sent by a rank for T tokens of F features on an FP8 wire, 16 bytes being a scale
and its padding (gathered bytes share one scale, found by an all-reduce of 4 bytes):

    gather (t-1) T/t F        reduce-scatter (t-1) (T/t F + 16)     all-reduce 2 (t-1) (T/t F + 16)

Operands with scales per row or block are gathered with them. A gradient of the output is then
gathered twice, cast along each of the two contractions, as is a saved input in backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import (
    Wire,
    all_gather,
    all_gather_scalars,
    all_reduce,
    max_over_group,
    reduce_scatter,
)
from fp8lm.comm.handles import Handle
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.quantizer import Quantizer
from fp8lm.layers.shard_spec import ShardSpec
from fp8lm.layers.tp_context import TPComm, TPContext
from fp8lm.numerics import BF16, E4M3, FP32, Format
from fp8lm.parallel.query_groups import SharedQueryGroup
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True, kw_only=True)
class TensorParallel(TPContext):
    """The group, whether the sequence is split between layers, and its two wires.

    `query_group` is set if a query group spans several ranks.
    """

    group: dist.ProcessGroup
    sequence_parallel: bool
    gather_wire: Wire
    reduce_wire: Wire
    kernels: Kernels
    query_group: SharedQueryGroup | None = None

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    def shard(self, dim: int, num_sections: int = 1) -> ShardSpec:
        """This rank's part along `dim`."""
        return ShardSpec(dim, num_sections, self.rank, self.size)

    def replicated_side(self) -> TPComm:
        """See `TPContext`."""
        return SequenceParallelComm(self) if self.sequence_parallel else TPAllReduceComm(self)

    def sharded_side(self) -> TPComm:
        """See `TPContext`."""
        return TPComm()

    def gather_query_group(self, x_SBF: Tensor) -> Tensor:
        """See `TPContext`."""
        return x_SBF if self.query_group is None else self.query_group.gather(x_SBF)

    def max(self, values: Tensor) -> Tensor:
        """See `TPContext`."""
        return max_over_group(values, self.group, self.gather_wire).wait()

    def gather(self, values: Tensor) -> Tensor:
        """See `TPContext`."""
        return all_gather_scalars(values, self.group, self.gather_wire)

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """See `TPContext`."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
        total = all_reduce(packed, FP32, self.group, self.reduce_wire, self.kernels).wait()
        for tensor, part in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


class TPAllReduceComm(TPComm):
    """Activations are the same on all ranks; partial sums are all-reduced."""

    reduces = True

    def __init__(self, tp: TensorParallel) -> None:
        self.tp = tp

    def reduce(self, y: Tensor) -> Handle[Tensor]:
        """[T, F] -> [T, F], the same bits on every rank."""
        fmt, wire = wire_format(self.tp.reduce_wire, y.dtype), self.tp.reduce_wire
        options: dict[str, Any] = {"dtype": y.dtype, "observer": self.observer}
        return all_reduce(y, fmt, self.tp.group, wire, self.tp.kernels, **options)


class SequenceParallelComm(TPAllReduceComm):
    """Each rank holds a part of the tokens; partial sums are reduce-scattered."""

    gathers = True

    def wire_quantizer(self, operand: Quantizer, dtype: torch.dtype) -> Quantizer:
        """Casts [T/t, F] to the wire's format; scales of all tokens are shared over the group."""
        fp8 = operand.format if operand.format.scaled else E4M3
        fmt = wire_format(self.tp.gather_wire, dtype, fp8)
        if fmt == operand.format and operand.known_scale is not None:
            return operand  # the same scale on all ranks
        return Quantizer(
            fmt,
            self.tp.kernels,
            granularity=operand.granularity,
            share_amax=self.tp.max if fmt.scaled else None,
        )

    def gather(self, x: ScaledTensor) -> Handle[ScaledTensor]:
        """[T/t, F] of every rank -> [T, F]."""
        return all_gather(x, self.tp.group, self.tp.gather_wire)

    def reduce(self, y: Tensor) -> Handle[Tensor]:
        """[T, F] -> this rank's rows [T/t, F] of the sum."""
        fmt, wire = wire_format(self.tp.reduce_wire, y.dtype), self.tp.reduce_wire
        options: dict[str, Any] = {"dtype": y.dtype, "observer": self.observer}
        return reduce_scatter(y, fmt, self.tp.group, wire, self.tp.kernels, **options)


def wire_format(wire: Wire, dtype: torch.dtype, fp8: Format = E4M3) -> Format:
    """What `wire` carries of values in `dtype` (bf16 or fp32): `fp8`, or these as they are."""
    if wire.precision == "fp8":
        return fp8
    return FP32 if dtype == torch.float32 else BF16
