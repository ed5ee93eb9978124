"""What a linear layer exchanges with other ranks at its input and at its output.

An edge is a pair of conjugates: what it does to activations in forward on one side of the layer,
its conjugate does to gradients in backward:

    gather   parts of the sequence -> the whole sequence      (bytes and one shared scale)
    reduce   partial sums -> their sum, or this rank's part of it

A layer gathers at its input edge in forward and reduces there in backward; at its output edge it
reduces in forward and gathers in backward. The plain `Edge` exchanges nothing: a layer on one
rank, and the side of a parallel layer whose features are already split.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fp8lm.comm.handles import Handle
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.layers.split import Split
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor, quantize


class Edge:
    """Exchanges nothing."""

    def cast(self, x: Tensor, fmt: Format, kernels: ReferenceKernels) -> ScaledTensor:
        """`x` [T, F] as this edge sends and saves it; `fmt` is what the GEMM will want."""
        return quantize(x, fmt, kernels)

    def gather(
        self, x: ScaledTensor, fmt: Format, kernels: ReferenceKernels
    ) -> Handle[ScaledTensor]:
        """What `cast` returned, of all ranks, as the GEMM's operand in `fmt`."""
        return Handle.done(x)

    def reduce(self, y: Tensor, kernels: ReferenceKernels) -> Handle[Tensor]:
        """The sum over ranks of `y` [T, F] (or this rank's rows of it), in the dtype of `y`."""
        return Handle.done(y)

    def share_amax(self, amax: Tensor) -> Tensor:
        """The amax of a weight from those of its parts."""
        return amax


NO_EXCHANGE = (Edge(), Edge())


class Partition:
    """How a model is divided within a layer. This one: not at all, one rank holds it."""

    rank = 0
    size = 1
    sequence_parallel = False

    def split(self, dim: int, parts: int = 1) -> Split:
        """This rank's part of a weight along `dim` (see `Split`)."""
        return Split(dim, parts)

    def boundary(self) -> Edge:
        """The edge of a layer towards replicated or sequence-split activations."""
        return Edge()

    def inside(self) -> Edge:
        """The edge of a layer on the side where features are split."""
        return Edge()

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


ALONE = Partition()
