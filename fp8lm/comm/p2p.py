"""Activations and their gradients between pipeline stages: one message each.

    FP8 wire     [E4M3 payload, a row per token | one fp32 scale per token]      1 + 4/H bytes
    BF16 wire    [values]                                                       2 bytes

per element, H being the hidden size. The residual stream has outliers in some tokens: a scale per
token keeps them from flattening all others. A token with a NaN or Inf arrives as NaN. (FP8-LM,
arXiv 2310.18313, section 2.3, sends BF16 here.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm.accounting import Wire
from fp8lm.comm.handles import Handle
from fp8lm.comm.transport import as_bytes, started
from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import BF16, E4M3, FP32, PER_ROW
from fp8lm.scaled_tensor import ScaledTensor

_SCALE_BYTES = 4


class PipelineP2P:
    """Sends tensors of one shape [..., H] in `dtype` between the ranks of `group`.

    `observer` is called after every cast to FP8, and must not wait for the device.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, wire: Wire, kernels: Kernels
    ) -> None:
        self.shape, self.dtype, self.wire, self.kernels = shape, dtype, wire, kernels
        self.observer: Callable[[Tensor, ScaledTensor], None] | None = None
        self.rows = 1
        for size in shape[:-1]:
            self.rows *= size
        self.format = E4M3 if wire.precision == "fp8" else FP32
        if wire.precision != "fp8" and dtype == torch.bfloat16:
            self.format = BF16

    @property
    def nbytes(self) -> int:
        """Size of a message."""
        scales = self.rows * _SCALE_BYTES if self.format.scaled else 0
        return self.rows * self.shape[-1] * self.format.bytes + scales

    def send(self, x: Tensor, to: int, group: dist.ProcessGroup) -> Handle[None]:
        """Send `x` to rank number `to` of `group`; the message is held until `wait()`."""
        message = self.pack(x)
        self.wire.count(message.numel())
        work = started(dist.isend(message, group=group, group_dst=to))

        def finish() -> None:
            work.wait()
            _ = message  # held until here

        return Handle(finish)

    def receive(
        self, source: int, group: dist.ProcessGroup, device: torch.device
    ) -> Handle[Tensor]:
        """Receive the next message of rank number `source` of `group`, in `dtype`."""
        message = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        work = started(dist.irecv(message, group=group, group_src=source))

        def finish() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:  # of gloo; NCCL's watchdog ends the process instead
                rank = dist.get_global_rank(group, source)
                raise RuntimeError(
                    f"nothing came from pipeline stage {source} (rank {rank})"
                ) from error
            return self.unpack(message)

        return Handle(finish)

    def pack(self, x: Tensor) -> Tensor:
        """`x` as the bytes of a message."""
        rows = x.detach().reshape(self.rows, self.shape[-1])
        if not self.format.scaled:
            return as_bytes(rows.to(self.format.dtype))
        message = torch.empty(self.nbytes, dtype=torch.uint8, device=x.device)
        sent = self._view(message)
        self.kernels.quantize_into([rows], [sent])
        if self.observer is not None:
            self.observer(rows, sent)
        return message

    def unpack(self, message: Tensor) -> Tensor:
        """The tensor that `pack` made `message` of, rounded as the wire rounds."""
        if not self.format.scaled:
            return message.view(self.format.dtype).view(self.shape).to(self.dtype)
        return self.kernels.dequantize(self._view(message), self.dtype).view(self.shape)

    def _view(self, message: Tensor) -> ScaledTensor:
        numel = self.rows * self.shape[-1]
        payload = message[:numel].view(self.rows, self.shape[-1])
        scale = message[numel:].view(torch.float32)[:, None]
        return ScaledTensor(payload, scale, self.format, PER_ROW)
