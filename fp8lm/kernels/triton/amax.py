"""The absolute maximum of a tensor, as the bits of fp32: their order has NaN above Inf above all.

Every program leaves the maximum of its part, and whoever wants that of the tensor takes the largest
of these few: no memory has to be cleared before, and there is no atomic operation.

Kernels that make a tensor leave its maxima beside it, and `Memo` has them for the cast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8lm.kernels.triton.launch import launch
from fp8lm.kernels.triton.numbers import magnitude

MAX_PARTS = 512  # about four programs on every multiprocessor of a Hopper GPU
_BLOCK = 8192


def partial_amaxes(x: Tensor, max_parts: int = MAX_PARTS) -> Tensor:
    """Maxima of |x| over up to `max_parts` parts of `x` (any float dtype): bits, int32 [parts]."""
    x = x.contiguous()
    parts = num_parts(x.numel(), _BLOCK, max_parts)
    amaxes = torch.empty(parts, dtype=torch.int32, device=x.device)
    launch(
        partial_amax,
        (parts,),
        x,
        amaxes,
        x.numel(),
        reads=[x],
        writes=[amaxes],
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return amaxes


def num_parts(numel: int, block: int, max_parts: int = MAX_PARTS) -> int:
    """Programs that share `numel` elements; each takes every so many-th block."""
    return max(1, min(max_parts, triton.cdiv(numel, block)))


@triton.jit
def partial_amax(x_ptr, amax_ptr, numel, BLOCK: tl.constexpr):
    """The kernel of `partial_amaxes`."""
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
        x = tl.load(x_ptr + start + offsets, mask=start + offsets < numel, other=0.0)
        largest = tl.maximum(largest, magnitude(x.to(tl.float32)))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def largest_of(amax_ptr, parts, PARTS: tl.constexpr):
    """Bits of the amax: the largest of `parts` (at most `PARTS`) numbers of `partial_amaxes`."""
    if PARTS == 1:
        amax = tl.load(amax_ptr) & 0x7FFFFFFF
    else:
        index = tl.arange(0, PARTS)
        amax = tl.max(tl.load(amax_ptr + index, mask=index < parts, other=0), axis=0)
    return amax
