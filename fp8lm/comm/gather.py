"""All-gather and broadcast of scaled tensors, without any rounding: payloads are sent as stored.

A tensor whose scale is NaN (its amax was not finite) arrives with that scale, so its values are NaN
on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm.accounting import Wire
from fp8lm.comm.handles import Handle
from fp8lm.comm.message import MessageLayout
from fp8lm.comm.transport import all_gather_bytes, as_bytes, broadcast_bytes
from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor


def all_gather(x: ScaledTensor, group: dist.ProcessGroup, wire: Wire) -> Handle[ScaledTensor]:
    """Shards [n, ...] -> the tensor [n * W, ...], in rank order.

    Scales of the whole first dimension must be the same on all ranks (see `max_over_group`), and
    are not sent; those of rows and blocks are, with the payload. All ranks have the same n. `x`
    must not be written to before `wait()`; in a group of one rank the result shares its memory.
    """
    if not x.shape:
        raise ValueError("a gathered tensor needs a first dimension")
    if not x.granularity.spans(0):
        return all_gather_values(x, group, wire).then(_concatenate)
    shape = (group.size() * x.shape[0], *x.shape[1:])
    scale, fmt, inverse = x.scale, x.format, x.inverse

    def join_payloads(gathered: Tensor) -> ScaledTensor:
        payload = gathered.view(-1).view(fmt.storage).view(shape)
        return ScaledTensor(payload, scale, fmt, x.granularity, inverse)

    return all_gather_bytes(as_bytes(x.payload), group, wire).then(join_payloads)


def _concatenate(parts: Sequence[ScaledTensor]) -> ScaledTensor:
    payload = torch.cat([part.payload for part in parts])
    scale = torch.cat([part.scale for part in parts])
    return ScaledTensor(payload, scale, parts[0].format, parts[0].granularity)


def all_gather_values(
    x: ScaledTensor, group: dist.ProcessGroup, wire: Wire
) -> Handle[list[ScaledTensor]]:
    """Tensors of one shape, each cast with its own rank's scale -> all of them, in rank order.

    Scales are sent with the payloads. The results are views of one buffer; `kernels.join`
    concatenates their values.
    """
    layout = MessageLayout.of([x])
    return _gather_messages(layout, layout.pack([x]), group, wire)


def cast_and_gather(
    x: Tensor, fmt: Format, group: dist.ProcessGroup, wire: Wire, kernels: Kernels
) -> Handle[list[ScaledTensor]]:
    """The same of `x` (bf16 or fp32), which is cast to `fmt` on the way into its message."""
    layout = MessageLayout(((tuple(x.shape), fmt),))
    message = torch.empty(layout.nbytes, dtype=torch.uint8, device=x.device)
    kernels.quantize_into([x], layout.views(message))
    return _gather_messages(layout, message, group, wire)


def _gather_messages(
    layout: MessageLayout, message: Tensor, group: dist.ProcessGroup, wire: Wire
) -> Handle[list[ScaledTensor]]:
    def unpack(gathered: Tensor) -> list[ScaledTensor]:
        return [tensor for (tensor,) in layout.views_of(list(gathered))]

    return all_gather_bytes(message, group, wire).then(unpack)


def all_gather_scalars(values: Tensor, group: dist.ProcessGroup, wire: Wire) -> Tensor:
    """fp32 `values` (any shape) of every rank, in rank order: [W, ...]; waits for them."""
    sent = as_bytes(values)
    gathered = all_gather_bytes(sent, group, wire).wait()
    return gathered.view(-1).view(values.dtype).view(group.size(), *values.shape)


def broadcast(
    x: ScaledTensor, src: int, group: dist.ProcessGroup, wire: Wire
) -> Handle[ScaledTensor]:
    """Payload and scale of `x` on rank number `src` of `group`, in one message.

    On other ranks `x` only gives shape and format.
    """
    if not 0 <= src < group.size():
        raise ValueError(f"rank {src} does not exist in a group of {group.size()}")
    if group.size() == 1:
        return Handle.done(x)
    layout = MessageLayout.of([x])
    if group.rank() == src:
        message = layout.pack([x])
    else:
        message = torch.empty(layout.nbytes, dtype=torch.uint8, device=x.device)
    return broadcast_bytes(message, src, group, wire).then(lambda m: layout.views(m)[0])
