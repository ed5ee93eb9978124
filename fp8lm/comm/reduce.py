"""Sums over ranks whose terms are sent in eight bits.

    reduce-scatter   x_r [W n, ..] -> sum_r x_r[own rows] [n, ..]
                     each rank casts what it sends with a scale per destination, all-to-all of
                     bytes with the scales in band, sum in fp32 in rank order
    all-reduce       reduce-scatter, then all-gather of the sums in the same format

One rounding per term, where a ring that sums in FP8 rounds at every hop (FP8-LM, arXiv
2310.18313, section 2.3, has FP8 on these wires; the sum in fp32 is ours). What does not travel is
not rounded: a rank's own term stays as it is, and a group of one rank returns its input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from fp8lm.comm.accounting import Wire
from fp8lm.comm.gather import cast_and_gather
from fp8lm.comm.handles import Handle
from fp8lm.comm.message import MessageLayout
from fp8lm.comm.transport import all_to_all_bytes
from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor

CastObserver = Callable[[Tensor, ScaledTensor], None]


def reduce_scatter(
    x: Tensor,
    fmt: Format,
    group: dist.ProcessGroup,
    wire: Wire,
    kernels: Kernels,
    *,
    dtype: torch.dtype = torch.float32,
    observer: CastObserver | None = None,
) -> Handle[Tensor]:
    """`x` [W n, ...] (bf16 or fp32) of all ranks -> rows of this rank of their sum, [n, ...].

    Terms are sent in `fmt`; BF16 and FP32 in the same way without scales. `x` may be overwritten
    as soon as this returns, except in a group of one rank, whose result can be `x` itself. A NaN or
    Inf makes the whole shard NaN on the rank it is sent to. `observer` is called after every cast
    to a scaled format. ValueError if W does not divide rows.
    """
    world_size, rank = group.size(), group.rank()
    if x.shape[0] % world_size:
        raise ValueError(
            f"{x.shape[0]} rows cannot be scattered evenly over {world_size} ranks: "
            f"the first dimension of {tuple(x.shape)} must be divisible by {world_size}"
        )
    if world_size == 1:
        return Handle.done(x.to(dtype))
    chunks = x.chunk(world_size)
    layout = MessageLayout(((tuple(chunks[rank].shape), fmt),))
    sizes = [layout.nbytes * (other != rank) for other in range(world_size)]
    send = torch.empty(sum(sizes), dtype=torch.uint8, device=x.device)  # nobody reads padding
    others = [other for other in range(world_size) if other != rank]
    targets = layout.views_of([send.split(sizes)[other] for other in others])
    kernels.quantize_into([chunks[other] for other in others], [target for (target,) in targets])
    if observer is not None and fmt.scaled:
        for other, (target,) in zip(others, targets, strict=True):
            observer(chunks[other], target)
    own = chunks[rank].clone()

    def add_up(received: list[Tensor]) -> Tensor:
        arrived = layout.views_of([received[other] for other in others])
        terms: list[ScaledTensor | Tensor] = [tensor for (tensor,) in arrived]
        terms.insert(rank, own)
        return kernels.sum_in_order(terms, dtype)

    return all_to_all_bytes(send, sizes, sizes, group, wire).then(add_up)


def all_reduce(
    x: Tensor,
    fmt: Format,
    group: dist.ProcessGroup,
    wire: Wire,
    kernels: Kernels,
    *,
    dtype: torch.dtype = torch.float32,
    observer: CastObserver | None = None,
) -> Handle[Tensor]:
    """Sum of `x` (bf16 or fp32, any shape) over all ranks, the same bits on each of them.

    Terms and sums are sent in `fmt`. Only the first half runs before `wait()`.
    """
    if group.size() == 1:
        return Handle.done(x.to(dtype))
    shape, numel = x.shape, x.numel()
    padded = x.reshape(-1)
    if numel % group.size():
        padded = functional.pad(padded, (0, -numel % group.size()))

    def share(own_sum: Tensor) -> Tensor:
        # The owner, too, goes on with the rounded sum, or its bits would differ from the others'.
        shards = cast_and_gather(own_sum, fmt, group, wire, kernels).wait()
        if observer is not None and fmt.scaled:
            observer(own_sum, shards[group.rank()])
        return kernels.join(shards, dtype)[:numel].view(shape)

    return reduce_scatter(padded, fmt, group, wire, kernels, observer=observer).then(share)
