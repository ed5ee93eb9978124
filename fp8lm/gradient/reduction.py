"""Gradients of all replicas to their owners: each in its own scale, summed in fp32.

    g[own rows] = 1/d sum_r dequantize(g_r[own rows])

Every rank sends its bytes and its scale straight to the owner, who sums in rank order: one
rounding per contribution, where a ring that sums in FP8 (FP8-LM, arXiv 2310.18313, section 2.1)
rounds at every hop, and no scale to agree on, so nothing overflows. Same bytes as a
reduce-scatter. A NaN scale (a gradient that was not finite) makes the owner's rows NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Handle, MessageLayout, Wire, all_to_all_bytes
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.numerics import BF16, E4M3, FP32, Format
from fp8lm.scaled_tensor import ScaledTensor


class Fp32Accumulate:
    """The mean over the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup, wire: Wire, kernels: ReferenceKernels) -> None:
        self.group = group
        self.wire = wire
        self.kernels = kernels

    def start(self, parts: Sequence[Sequence[ScaledTensor]]) -> Handle[list[Tensor]]:
        """`parts[r]`: this rank's gradients of what rank r owns -> means of this rank's, fp32."""
        rank, own = self.group.rank(), parts[self.group.rank()]
        messages = [
            MessageLayout.of(gradients).pack(gradients)
            for other, gradients in enumerate(parts)
            if other != rank and gradients
        ]
        sizes = [
            MessageLayout.of(gradients).nbytes * (other != rank and bool(gradients))
            for other, gradients in enumerate(parts)
        ]
        device = next(gradient.device for gradients in parts for gradient in gradients)
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        layout = MessageLayout.of(own)  # of what every other rank sends me
        receive = [layout.nbytes * (other != rank and bool(own)) for other in range(len(parts))]

        def mean(received: list[Tensor]) -> list[Tensor]:
            return self._mean(own, layout, received)

        buffer = torch.cat([empty, *messages])
        return all_to_all_bytes(buffer, sizes, receive, self.group, self.wire).then(mean)

    def _mean(
        self, own: Sequence[ScaledTensor], layout: MessageLayout, received: list[Tensor]
    ) -> list[Tensor]:
        sums = [torch.zeros(part.shape, device=part.device) for part in own]
        if not own:
            return sums
        for other, message in enumerate(received):
            terms = own if other == self.group.rank() else layout.views(message)
            for total, term in zip(sums, terms, strict=True):
                total += term.dequantize(self.kernels)
        return [total.div_(self.group.size()) for total in sums]


def sent_format(stored: Format, wire: Wire, *, dense: bool) -> Format:
    """What a gradient in format `stored` travels in; never in more bytes than it has.

    Gradients of embeddings, norms and biases (`dense`) travel in BF16 on an FP8 wire.
    """
    wanted = FP32 if wire.precision == "fp32" else BF16
    if wire.precision == "fp8" and not dense:
        wanted = E4M3
    return stored if stored.bytes <= wanted.bytes else wanted
