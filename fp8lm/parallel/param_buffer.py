"""The buffer that holds a rank's model parameters, and its all-gather after a step.

    buffer = [ rank 0's shard | rank 1's shard | .. ]

Model parameters are views of the buffer. A rank updates its shard in place and all-gathers it.
Scales are not sent: every rank computes them from shared amaxes, bit for bit the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Handle, Wire, all_gather_uneven
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.param import Param
from fp8lm.layers.shard_spec import LocalShards, Rows
from fp8lm.parallel.param_layout import ParamLayout
from fp8lm.scaled_tensor import ScaledTensor


class ParamBuffer:
    """The model parameters of `weights`, moved into one buffer as `layout` says.

    On an FP8 `wire` the stored payloads are sent. On a BF16 one their values are, two bytes each
    and exact for FP8 and BF16; the receiver casts them back to the same payloads.
    """

    def __init__(
        self,
        weights: dict[str, Param],
        layout: ParamLayout,
        group: dist.ProcessGroup,
        wire: Wire,
        kernels: Kernels,
    ) -> None:
        self.names = list(weights)
        self.local_shards = dict(layout.rows[group.rank()])
        self._weights, self._rows, self._sizes = weights, layout.rows, layout.shard_bytes
        self._group, self._wire, self._kernels = group, wire, kernels
        self._arriving: Handle[Tensor] | None = None
        device = next(iter(weights.values())).model_param.device
        self._buffer = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=device)
        for name, weight in weights.items():
            start, payload = layout.start[name], weight.model_param.payload
            view = self._buffer[start : start + payload.nbytes]
            view = view.view(payload.dtype).view(payload.shape)
            weight.bind_storage(view.copy_(payload))

    @property
    def padding(self) -> int:
        """Bytes of the buffer that no weight fills."""
        return self._buffer.nbytes - sum(
            w.model_param.payload.nbytes for w in self._weights.values()
        )

    def start_gather(self) -> None:
        """Send this rank's rows; `wait` before anything reads a weight."""
        self.wait()
        if self._wire.precision == "bf16":
            counts = [self._count(own) for own in self._rows]
            message, sizes = self._values(counts), [2 * count for count in counts]
            arriving = all_gather_uneven(message.view(torch.uint8), sizes, self._group, self._wire)
            self._arriving = arriving.then(lambda received: self._take(received, sizes))
        else:
            self._arriving = all_gather_uneven(self._buffer, self._sizes, self._group, self._wire)

    def wait(self) -> None:
        """Wait for the all-gather, if one has started."""
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            arriving.wait()

    def _values(self, counts: list[int]) -> Tensor:
        message = torch.empty(sum(counts), dtype=torch.bfloat16, device=self._buffer.device)
        start = sum(counts[: self._group.rank()])
        for name, rows in self.local_shards.items():
            values = self._kernels.dequantize(self._part(name, rows), torch.bfloat16)
            message[start : start + values.numel()].copy_(values.view(-1))
            start += values.numel()
        return message

    def _take(self, received: Tensor, sizes: list[int]) -> Tensor:
        for rank, message in enumerate(received.split(sizes)):
            if rank == self._group.rank():
                continue
            start, values = 0, message.view(torch.bfloat16)
            for name, rows in self._rows[rank].items():
                part = self._part(name, rows)
                stop = start + part.payload.numel()
                cast = self._kernels.cast(values[start:stop], part.scale, part.format)
                part.payload.copy_(cast.view(part.shape))
                start = stop
        return received

    def _part(self, name: str, rows: Rows) -> ScaledTensor:
        return self._weights[name].model_param.rows(*rows)

    def _count(self, rows: LocalShards) -> int:
        return sum(self._part(name, span).payload.numel() for name, span in rows.items())
