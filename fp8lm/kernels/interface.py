"""The interface of kernels: all operations on low-precision tensors that a backend implements.

A backend is one class that defines every operation itself; none inherits another's, so an
operation that it lacks is a type error and not a silent run of the reference. (`CompiledKernels`
are the reference, of which they compile some operations.) Where a backend has nothing faster than
eager PyTorch it calls the reference by name, and says so in `backends`.

Shapes: M, N, K of a matrix product. Operands are `ScaledTensor`s, [M,K] and [N,K]: the dimension
that is summed over comes last in both, and is contiguous (`transpose` makes it so).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fp8lm.batch import Documents
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.attention import DocumentMask
from fp8lm.numerics import PER_TENSOR, Format, Granularity
from fp8lm.scaled_tensor import ScaledTensor

# The operations that `Kernels.backends` reports to users.
GEMM, ATTENTION, ELEMENTWISE = "gemm", "attention", "elementwise"


class Kernels(Protocol):
    """No operation waits for the device; NaN and Inf survive all of them."""

    @property
    def backends(self) -> Mapping[str, str]:
        """What runs `gemm`, `attention` and everything else (`elementwise`), in words."""

    def amax(self, x: Tensor) -> Tensor:
        """Absolute maximum of `x` (any float dtype) as a 0-d fp32 tensor; NaN and Inf survive."""

    def cast(self, x: Tensor, scale: Tensor, fmt: Format, *, saturate: bool = True) -> Tensor:
        """`x * scale` in `fmt`, saturated, rounded to nearest even; payload of `fmt.storage`.

        `scale` multiplies `x` elementwise, or is 0-d. `saturate=False` where the caller knows that
        no `x * scale` exceeds `fmt.max`.
        """

    def quantize(
        self,
        x: Tensor,
        fmt: Format,
        *,
        amax: Tensor | None = None,
        granularity: Granularity = PER_TENSOR,
    ) -> ScaledTensor:
        """`x` (bf16 or fp32) in `fmt`, with the scale of `amax` (default: that of `x`).

        Pass `amax` (fp32, shape of the scales) when it was reduced over the ranks that hold the
        other shards of the tensor. A format without scale is a cast, per tensor.
        """

    def quantize_with_transpose(
        self, x: Tensor, fmt: Format, *, amax: Tensor | None = None, sums: bool = False
    ) -> tuple[ScaledTensor, ScaledTensor]:
        """`x` [R,C] as `quantize` gives it, per tensor, and as `transpose` gives that.

        `sums`: `column_sums` of `x` are wanted next, and may be found on the way.
        """

    def column_sums(self, x: Tensor) -> Tensor:
        """Sum over the rows of `x` [R,C] (bf16 or fp32), [C] in its dtype."""

    def quantize_into(self, sources: Sequence[Tensor], targets: Sequence[ScaledTensor]) -> None:
        """Each of `sources` (bf16 or fp32) as `quantize` gives it, written into its target.

        So a message is made where it lies: targets are views of it. Each has its own scale or
        scales, of its format and granularity.
        """

    def dequantize(self, x: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of `x` in `dtype` (bf16 or fp32), exact in fp32; may share memory with `x`."""

    def join(self, parts: Sequence[ScaledTensor], dtype: torch.dtype) -> Tensor:
        """Values of `parts` (each [n, ...], any scales) in `dtype`, in one tensor [n * W, ...]."""

    def copies_transposed(self, fmt: Format) -> bool:
        """Whether `transpose` of a matrix in `fmt` takes memory of its own."""

    def transpose(self, x: ScaledTensor) -> ScaledTensor:
        """[R,C] -> [C,R] as `gemm` reads it; a view where `gemm` reads that as well."""

    def gemm(
        self,
        a: ScaledTensor,
        b: ScaledTensor,
        *,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        fast_accumulation: bool = False,
    ) -> Tensor:
        """`A[M,K] @ B[N,K]^T + bias[N]`, [M,N] in `out_dtype`; accumulated in fp32.

        `fast_accumulation` is a permission that only tensor cores use. ValueError for operands
        that Hopper's tensor cores would refuse (see `check_gemm_operands`), on every device.
        """

    def accumulate_(self, total: ScaledTensor, x: Tensor) -> None:
        """`total += x` (bf16 or fp32), with the scale or scales of the sum."""

    def add_rows_(self, total: Tensor, rows: Tensor, values: Tensor) -> None:
        """`total[rows[i]] += values[i]` for fp32 [R,C], int64 [N] and bf16 or fp32 [N,C].

        Rows that come up several times are summed in one order: the result is the same every time.
        """

    def square_sums_and_amaxes(self, tensors: Sequence[ScaledTensor]) -> tuple[Tensor, Tensor]:
        """Sum of squares (fp64 [n]) and absolute maximum (fp32 [n]) of each of n > 0 tensors."""

    def sum_in_order(
        self, terms: Sequence[ScaledTensor | Tensor], dtype: torch.dtype, *, divisor: int = 1
    ) -> Tensor:
        """Sum of `terms` (one shape) in fp32, in their order, over `divisor`; then in `dtype`."""

    def add_in_format(self, a: ScaledTensor, b: ScaledTensor) -> ScaledTensor:
        """`a + b`, both of one scale, rounded to their format with that scale."""

    def saturated_share(self, x: ScaledTensor) -> Tensor:
        """Share of the values of `x` (FP8) whose magnitude is the format's largest, 0-d fp32."""

    def adam(
        self, params: Sequence[AdamParam], table: AdamTable, coefficients: AdamCoefficients
    ) -> Tensor:
        """One AdamW step of all `params`, payloads in place; see `fp8lm.kernels.adam`.

        Returns fp32 [len(params), 3]: the true amax of the new master, m and v (0 where no copy
        of them has a scale). Scales stay what they are: the caller replaces them by the table's.
        """

    def document_mask(self, documents: Documents, dtype: torch.dtype) -> DocumentMask:
        """What `attention` in `dtype` reads of `documents`; made once per micro-batch."""

    def attention(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        dropout: float,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """Causal `scaled_dot_product_attention`, [B,N,S,D] in the dtype of `q_BNSD`.

        With `mask`, of `document_mask`, within each document alone; `dropout` is 0 then where the
        kernel has none (see `fp8lm.kernels.attention`).
        """

    def attention_at(
        self, q_BNSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, positions_BS: Tensor
    ) -> Tensor:
        """Attention of queries at any positions (int64) to keys and values 0 .. position.

        [B,N,S,D] in the dtype of `q_BNSD`; of the C keys those after a query's position may hold
        any finite numbers.
        """

    def rope(
        self, qkv_SBGHD: Tensor, cos: Tensor, sin: Tensor, queries: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of a fused projection: q [S,B,N,D] and k [S,B,G,D], both rotated, and v [S,B,G,D].

        A group's H heads are its queries, of which the slice `queries` is wanted, its key and its
        value. `cos` and `sin` [S,1,1,R] (or [S,B,1,R]), in the dtype of the projection, rotate the
        first R features; their second halves repeat the first. v may be a view.
        """

    def rope_backward(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        queries: slice,
        heads_per_group: int,
    ) -> Tensor:
        """Gradient [S,B,G,H,D] of the projection; `gradients` are of the three results of `rope`.

        Queries that were not wanted get zeros; `heads_per_group` is H.
        """

    def cross_entropy(
        self,
        logits_TV: Tensor,
        columns_T: Tensor,
        used: int,
        gather: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss of every token, fp32 [T]; and the tensors to save for the backward.

        `columns_T` (int64) are the labels as columns of `logits_TV` (bf16 or fp32); those outside
        are on other ranks. The first `used` columns count. `gather` brings fp32 [2,T] of all ranks
        that hold a part of the vocabulary, [t,2,T]; None if this one holds all of it.
        """

    def cross_entropy_backward(self, saved: tuple[Tensor, ...], dy_T: Tensor, used: int) -> Tensor:
        """Gradient of the logits, in their dtype and possibly in their memory: call it once."""

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """LayerNorm of `x` over its last dimension, RMSNorm without `bias`, in the dtype of `x`.

        Second: the tensors that `norm_backward` wants, statistics of every row.
        """

    def norm_backward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        statistics: tuple[Tensor, ...],
        dy: Tensor,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients of `x`, `weight` and, if there is one, `bias`.

        `residual` (as `dy`) is the gradient of `x` from elsewhere, and is added to it.
        """

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """GELU of bf16 or fp32; `approximate` is "tanh" or "none", as in PyTorch."""

    def gelu_backward(self, x: Tensor, dy: Tensor, approximate: str) -> Tensor:
        """Gradient of `x`; `dy` is that of `gelu(x, approximate)`."""

    def swiglu(self, x: Tensor) -> Tensor:
        """`silu(gate) * up` of x = [gate | up] (bf16 or fp32), [.., 2F] -> [.., F]."""

    def swiglu_backward(self, x: Tensor, dy: Tensor) -> Tensor:
        """Gradient of `x`; `dy` [.., F] is that of `swiglu(x)`."""
