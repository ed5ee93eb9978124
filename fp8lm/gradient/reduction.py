"""Gradient reduction to the owners: each contribution in its own scale, summed in fp32.

    g[own rows] = 1/d sum_r dequantize(g_r[own rows])      d: see `ParamGroup.divisor`

Every rank sends its bytes and its scale straight to the owner, who sums in rank order: one
rounding per contribution, where a ring that sums in FP8 (see `fp8_sum`) rounds at every hop, and
no scale to agree on, so nothing overflows. Same bytes as a reduce-scatter. A NaN scale (a gradient
that was not finite) makes the owner's rows NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Handle, MessageLayout, Wire, all_to_all_bytes
from fp8lm.comm.message import pack_all
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.shard_spec import LocalShards
from fp8lm.numerics import BF16, E4M3, FP32, Format
from fp8lm.scaled_tensor import ScaledTensor

Parts = Sequence[Sequence[ScaledTensor]]


class GradientReduction(Protocol):
    """Mean of gradients, summed over the ranks of `group`, each row on the rank that owns it."""

    group: dist.ProcessGroup
    wire: Wire
    kernels: Kernels

    def start(
        self, gradients: Mapping[str, ScaledTensor], rows: Sequence[LocalShards]
    ) -> Handle[dict[str, Tensor]]:
        """This rank's whole `gradients` -> the means of the rows it owns (fp32), by name.

        `rows[r]` are those that rank r owns; names that `gradients` lacks are passed over. All
        ranks start and wait in the same order.
        """

    def finish_step(self, skipped: Tensor) -> None:
        """End of a step whose gradients are reduced; `skipped` (0-d bool): it was not applied."""

    def named_tensors(self) -> dict[str, Tensor]:
        """State kept from step to step, for a checkpoint; the same on all ranks."""


class Fp32ReduceScatter:
    """All-to-all to the owners, who sum in fp32; `divisor` None: the number of ranks."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        wire: Wire,
        kernels: Kernels,
        divisor: int | None = None,
    ) -> None:
        self.group = group
        self.wire = wire
        self.kernels = kernels
        self.divisor = divisor or group.size()

    def start(
        self, gradients: Mapping[str, ScaledTensor], rows: Sequence[LocalShards]
    ) -> Handle[dict[str, Tensor]]:
        """See `GradientReduction`."""
        names, parts = cut(gradients, rows), parts_of(gradients, rows)
        device = next(iter(gradients.values())).device
        summing = reduce_scatter_fp32(
            parts, self.group, self.wire, self.kernels, device, divisor=self.divisor
        )
        own = names[self.group.rank()]
        return summing.then(lambda means: dict(zip(own, means, strict=True)))

    def finish_step(self, skipped: Tensor) -> None:
        """No state to update."""

    def named_tensors(self) -> dict[str, Tensor]:
        """No state."""
        return {}


def reduce_scatter_fp32(
    parts: Parts,
    group: dist.ProcessGroup,
    wire: Wire,
    kernels: Kernels,
    device: torch.device,
    *,
    uncast: Sequence[Tensor] | None = None,
    divisor: int = 1,
) -> Handle[list[Tensor]]:
    """`parts[r]` for rank r -> fp32 sums, in rank order, of what all ranks hold of one's own.

    They are divided by `divisor`. A part may be empty. `uncast` (fp32) is this rank's own term if
    it was not cast, since it is not sent; `parts[own rank]` then only gives shapes and formats.
    """
    rank = group.rank()
    own = parts[rank]
    layouts = [MessageLayout.of(tensors) for tensors in parts]
    sizes = [
        layout.nbytes * (other != rank and bool(tensors))
        for other, (layout, tensors) in enumerate(zip(layouts, parts, strict=True))
    ]
    others = [other for other, size in enumerate(sizes) if size]
    receive = [layouts[rank].nbytes * (other != rank and bool(own)) for other in range(len(parts))]
    buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    messages = buffer.split(sizes)
    pack_all(
        [layouts[other] for other in others],
        [parts[other] for other in others],
        [messages[other] for other in others],
    )

    def add_up(received: list[Tensor]) -> list[Tensor]:
        if not own:
            return []
        arrived = layouts[rank].views_of([message for message in received if message.numel()])
        terms: list[Sequence[ScaledTensor | Tensor]] = [*arrived]
        terms.insert(rank, own if uncast is None else uncast)
        of_tensors = zip(*terms, strict=True)  # each tensor's, in rank order
        return [
            kernels.sum_in_order(of_one, torch.float32, divisor=divisor) for of_one in of_tensors
        ]

    return all_to_all_bytes(buffer, sizes, receive, group, wire).then(add_up)


def cut(gradients: Mapping[str, ScaledTensor], rows: Sequence[LocalShards]) -> list[list[str]]:
    """Which of `gradients` each rank owns rows of, in their order."""
    return [[name for name in gradients if name in own] for own in rows]


def parts_of(
    gradients: Mapping[str, ScaledTensor], rows: Sequence[LocalShards]
) -> list[list[ScaledTensor]]:
    """The rows that each rank owns, as views in the order of `cut`."""
    return [
        [gradient.rows(*own[name]) for name, gradient in gradients.items() if name in own]
        for own in rows
    ]


def sent_format(stored: Format, wire: Wire, *, keep_high_precision: bool) -> Format:
    """The format to send a gradient stored in `stored` in; never more bytes than it has.

    Gradients of embeddings, norms and biases (`keep_high_precision`) are
    sent in BF16 on an FP8 wire.
    """
    wanted = FP32 if wire.precision == "fp32" else BF16
    if wire.precision == "fp8" and not keep_high_precision:
        wanted = E4M3
    return stored if stored.bytes <= wanted.bytes else wanted
