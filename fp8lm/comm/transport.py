"""Raw bytes between ranks: the primitives of all collectives of scaled tensors.

All buffers are contiguous uint8, the one dtype that gloo and NCCL both move in every operation.
Each function starts its transfer, counts what leaves this rank and returns a handle, which holds
the buffers. A group of one rank sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import accounting
from fp8lm.comm.accounting import Wire
from fp8lm.comm.handles import Handle
from fp8lm.numerics import Format


def as_bytes(x: Tensor) -> Tensor:
    """The memory of `x` as uint8 [x.nbytes]; a view if `x` is contiguous, else of a copy."""
    return x.contiguous().view(-1).view(torch.uint8)


def all_gather_bytes(
    own: Tensor, group: dist.ProcessGroup, wire: Wire, *, out: Tensor | None = None
) -> Handle[Tensor]:
    """uint8 [n] of every rank -> uint8 [W, n].

    With `out` (uint8 [W, n]) the result is written there, and `own` may be its row of this rank,
    which then moves nowhere. n must be the same on all ranks: gloo aborts the job otherwise.
    """
    world_size = group.size()
    if out is not None and out.shape != (world_size, own.numel()):
        raise ValueError(f"{world_size} x {own.numel()} bytes do not fit {tuple(out.shape)}")
    if world_size == 1:
        return Handle.done(own.view(1, -1) if out is None else out.copy_(own))
    if out is None:
        out = own.new_empty(world_size, own.numel())
    wire.count(accounting.all_gather_sent(world_size, own.numel()))
    work = _all_gather_function()(out.view(-1), own, group=group, async_op=True)
    return _handle([started(work)], own, out)


def all_gather_uneven(
    buffer: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, wire: Wire
) -> Handle[Tensor]:
    """All-gather in place: `buffer` has `sizes[r]` bytes for every rank r, this rank's filled.

    One all-gather if all sizes are equal; otherwise a broadcast by each rank that has bytes, so
    that nothing is padded.
    """
    rank, size = group.rank(), group.size()
    if size == 1:
        return Handle.done(buffer)
    shards = buffer.split(list(sizes))
    if len(set(sizes)) == 1:
        out = buffer.view(size, sizes[0])
        return all_gather_bytes(shards[rank], group, wire, out=out).then(lambda _: buffer)
    works = []
    for source, shard in enumerate(shards):
        if shard.numel():
            wire.count(accounting.broadcast_sent(size, rank, source, shard.numel()))
            works.append(dist.broadcast(shard, group=group, group_src=source, async_op=True))
    return _handle(works, buffer, buffer)


def all_to_all_bytes(
    send: Tensor,
    send_sizes: list[int],
    receive_sizes: list[int],
    group: dist.ProcessGroup,
    wire: Wire,
) -> Handle[list[Tensor]]:
    """`send_sizes[r]` bytes of `send` to each rank r -> what came from each, views of one buffer.

    A size may be 0; that of this rank itself usually is. `receive_sizes[r]` must be what r sends.
    """
    received = send.new_empty(sum(receive_sizes))
    if group.size() == 1:
        return Handle.done(list(received.copy_(send).split(receive_sizes)))
    wire.count(accounting.all_to_all_sent(group.rank(), send_sizes))
    work = dist.all_to_all_single(
        received, send, receive_sizes, send_sizes, group=group, async_op=True
    )
    return _handle([work], send, received).then(lambda bytes_: list(bytes_.split(receive_sizes)))


def shift_bytes(
    send: Tensor, receive_size: int, group: dist.ProcessGroup, wire: Wire
) -> Handle[Tensor]:
    """`send` to the next rank of the ring; what the previous one sends, uint8 [receive_size].

    Either may be empty; sizes must agree between neighbours.
    """
    if group.size() == 1:
        return Handle.done(send)
    rank, size = group.rank(), group.size()
    received = send.new_empty(receive_size)
    following = dist.get_global_rank(group, (rank + 1) % size)
    previous = dist.get_global_rank(group, (rank - 1) % size)
    transfers = []
    if send.numel():
        transfers.append(dist.P2POp(dist.isend, send, following, group))
    if receive_size:
        transfers.append(dist.P2POp(dist.irecv, received, previous, group))
    wire.count(send.numel())
    works = dist.batch_isend_irecv(transfers) if transfers else []
    return _handle(works, send, received)


def sums_fp8(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the backend of `group` adds FP8 numbers up itself: NCCL 2.24 on Hopper, and newer."""
    if device.type != "cuda" or dist.get_backend(group) != "nccl":
        return False
    return torch.cuda.nccl.version() >= (2, 24) and torch.cuda.get_device_capability(device) >= (9,)


def reduce_scatter_fp8(
    codes: Sequence[Tensor], fmt: Format, group: dist.ProcessGroup, wire: Wire
) -> Handle[Tensor]:
    """Codes uint8 [n_r] for every rank r -> uint8, the sum of what all ranks have for this one.

    One reduction for each rank that gets any, as they get different amounts. Every partial sum is
    rounded to `fmt` and saturates (see `sums_fp8`). `codes` are overwritten.
    """
    rank, size = group.rank(), group.size()
    works = []
    for owner, part in enumerate(codes):
        if part.numel():
            wire.count(accounting.reduce_sent(size, rank, owner, part.numel()))
            part = part.view(fmt.dtype)
            works.append(dist.reduce(part, group=group, group_dst=owner, async_op=True))
    return _handle(works, codes, codes[rank])


def broadcast_bytes(
    buffer: Tensor, src: int, group: dist.ProcessGroup, wire: Wire
) -> Handle[Tensor]:
    """`buffer` of the rank that is number `src` in `group`, in place on all others."""
    if group.size() == 1:
        return Handle.done(buffer)
    wire.count(accounting.broadcast_sent(group.size(), group.rank(), src, buffer.numel()))
    work = dist.broadcast(buffer, group=group, group_src=src, async_op=True)
    return _handle([work], buffer, buffer)


def all_reduce_max(values: Tensor, group: dist.ProcessGroup, wire: Wire) -> Handle[Tensor]:
    """Elementwise maximum of int32 `values` over the ranks, in place."""
    if group.size() == 1:
        return Handle.done(values)
    wire.count(accounting.all_reduce_sent(group.size(), values.nbytes))
    work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group, async_op=True)
    return _handle([work], values, values)


def started(work: dist.Work | None) -> dist.Work:
    """`work`, which must exist (torch returns None on ranks outside the group)."""
    if work is None:
        raise RuntimeError("this process is not in the group")
    return work


def _handle(works: Sequence[dist.Work], sent: object, result: Tensor) -> Handle[Tensor]:
    def finish() -> Tensor:
        for work in works:
            work.wait()
        _ = sent  # held until here
        return result

    return Handle(finish)


def _all_gather_function() -> Callable[..., dist.Work | None]:
    # torch 2.13 renamed it, and warns of the old name, the only one that 2.11 and 2.12 have.
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
