"""Cross-entropy in one launch each way, reading logits as they are: there is no fp32 copy of them.

A program sums the exponentials of a token's logits in blocks, relative to the largest logit so far.
These sums are fp32 in an order of their own, below 64 2^-24 from the exact one; the rest is the
reference's arithmetic. The gradient takes the memory of the logits.

Shapes: see `fp8lm.kernels.cross_entropy`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from fp8lm.kernels.cross_entropy import Gather, Saved
from fp8lm.kernels.triton.launch import launch

_BLOCK = 4096
_WARPS = 8
_TOGETHER = 16  # columns whose mask is one, so that a load takes several


def cross_entropy(
    logits_TV: Tensor, columns_T: Tensor, used: int, gather: Gather | None
) -> tuple[Tensor, Saved]:
    """See `Kernels`."""
    logits_TV, columns_T = logits_TV.contiguous(), columns_T.contiguous()
    num_tokens, num_rows = logits_TV.shape
    read = _num_read(used, num_rows)
    terms = torch.empty(2, num_tokens, device=logits_TV.device)
    launch(
        log_sums,
        (num_tokens,),
        logits_TV,
        columns_T,
        terms,
        num_tokens,
        num_rows,
        read,
        used,
        reads=[logits_TV[:, :read], columns_T],
        writes=[terms],
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    lse_T, target_T = terms
    if gather is not None:
        lse, target = gather(terms).unbind(dim=1)
        lse_T, target_T = torch.logsumexp(lse, dim=0), target.sum(dim=0)
    return lse_T - target_T, (logits_TV, columns_T, lse_T)


def cross_entropy_backward(saved: Saved, dy_T: Tensor, used: int) -> Tensor:
    """See `Kernels`; the result is the first tensor of `saved`."""
    logits_TV, columns_T, lse_T = saved
    dy_T = dy_T.contiguous()
    num_tokens, num_rows = logits_TV.shape
    read = _num_read(used, num_rows)
    launch(
        softmax_gradient,
        (num_tokens, triton.cdiv(num_rows, _BLOCK)),
        logits_TV,
        columns_T,
        lse_T,
        dy_T,
        num_rows,
        read,
        used,
        reads=[logits_TV[:, :read], columns_T, lse_T, dy_T],
        writes=[logits_TV],
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    # Whoever else saved the logits for a backward of his own gets an error, not the gradient.
    increment_version(logits_TV)
    return logits_TV


def _num_read(used: int, num_rows: int) -> int:
    """Columns that are loaded: those in use, and padding up to where a load ends."""
    return min(triton.cdiv(used, _TOGETHER) * _TOGETHER, num_rows)


@triton.jit
def log_sums(
    logits_ptr, columns_ptr, terms_ptr, num_tokens, num_rows, read, used, BLOCK: tl.constexpr
):
    """Of one token: the logarithm of its sum of exponentials, and the label's logit or 0."""
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * num_rows
    offsets = tl.arange(0, BLOCK)
    largest, total = float("-inf"), 0.0
    for start in range(0, read, BLOCK):
        columns = start + offsets
        x = tl.load(logits_ptr + columns, mask=columns < read, other=0.0).to(tl.float32)
        x = tl.where(columns < used, x, float("-inf"))
        new = tl.maximum(largest, tl.max(x, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # the difference of two Inf is NaN
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), axis=0)
        largest = new
    tl.store(terms_ptr + token, largest + tl.log(total))
    column = tl.load(columns_ptr + token)
    is_here = (column >= 0) & (column < used)
    target = tl.load(logits_ptr + column, mask=is_here, other=0.0)
    tl.store(terms_ptr + num_tokens + token, target.to(tl.float32))


@triton.jit
def softmax_gradient(
    logits_ptr, columns_ptr, lse_ptr, dy_ptr, num_rows, read, used, BLOCK: tl.constexpr
):
    """Of one token and a block of rows: (softmax - onehot) * dy, in place; zero for padding."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits_ptr + token * num_rows + rows
    x = tl.load(place, mask=rows < read, other=0.0).to(tl.float32)
    gradient = tl.exp(x - tl.load(lse_ptr + token))
    gradient = tl.where(rows == tl.load(columns_ptr + token), gradient - 1.0, gradient)
    gradient = tl.where(rows < used, gradient * tl.load(dy_ptr + token), 0.0)
    tl.store(place, gradient, mask=rows < num_rows)
