"""Delayed scaling: the scale of a step comes from the amaxes of earlier ones.

    history <- [amax of the step, then the former ones but the last]
    scale = 2^floor(log2(format_max / (2^margin max(history))))

TransformerEngine's `DelayedScaling` (`transformer_engine/common/recipe`): one history per input,
weight and output gradient of every layer; the scale from its largest or its most recent amax, 1
while that is 0; what exceeds the scaled range saturates. Different from it:

- a history moves once in an optimizer step, by the largest amax of its micro-batches and of all
  ranks that hold a part of the layer, and not once in a micro-batch: so it is the same under every
  layout;
- an output gradient counts as that of the sum of losses: backward's is that of a mean over the
  step's tokens on this rank, a number that replicas divide and a ramp-up changes;
- scales are powers of two, as everywhere here;
- a step whose amax is 0 does not move a history, where theirs takes the 0 in, and an older amax
  leaves it sooner;
- a tensor whose amax is not finite is cast with scale NaN, so that its step is skipped, and a step
  that is skipped leaves no trace in the histories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fp8lm.config import PrecisionConfig
from fp8lm.layers.quantizer import Quantizer, TensorKind
from fp8lm.numerics import Format, scale_from_amax

HistoryKey = tuple[str, TensorKind]  # the path of the layer, and which of its tensors


class DelayedScale:
    """The scale of one tensor, known before the cast: 1 until `AmaxHistories` holds it.

    The amax of the tensor goes to `recorded` (0-d fp32), while there is one. Both are of the tensor
    times `unit`, a power of two.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.recorded: Tensor | None = None
        self.unit: Tensor | float = 1.0

    def __call__(self, amax: Tensor) -> Tensor:
        """See `KnownScale`."""
        if self.recorded is not None:
            self.recorded.copy_(torch.maximum(self.recorded, amax * self.unit))
        value = torch.ones_like(amax) if self.value is None else self.value
        return torch.where(amax.isfinite(), value * self.unit, torch.nan)


class AmaxHistories:
    """The histories and scales of all `quantizers` whose scale is a `DelayedScale`.

    It also tells every known scale of an output gradient the number of tokens.
    `share` reduces amaxes over all ranks that hold a part of these layers, or the same part.
    """

    def __init__(
        self,
        quantizers: Mapping[HistoryKey, Quantizer],
        precision: PrecisionConfig,
        device: torch.device,
        share: Callable[[Tensor], Tensor],
    ) -> None:
        self.precision = precision
        self.length = precision.fp8_amax_history_len
        self._share = share
        delayed = {
            key: (quantizer.format, quantizer.known_scale)
            for key, quantizer in quantizers.items()
            if isinstance(quantizer.known_scale, DelayedScale)
        }
        self._formats = [fmt for fmt, _ in delayed.values()]
        self._scales_of = [scale for _, scale in delayed.values()]
        of_gradients = [
            quantizer.known_scale
            for (_, kind), quantizer in quantizers.items()
            if kind == "grad_output" and quantizer.known_scale is not None
        ]
        # On the device, where a replayed CUDA graph reads it too.
        self._units = [torch.ones((), device=device)] if of_gradients else []
        for scale in of_gradients:
            (scale.unit,) = self._units
        self._values = torch.zeros(len(delayed), self.length, device=device)
        self._scales = torch.ones(len(delayed), device=device)
        self._recorded = torch.zeros(len(delayed), device=device)
        self._of_format = {
            fmt: torch.tensor([other == fmt for other in self._formats], device=device)
            for fmt in dict.fromkeys(self._formats)
        }
        # The rows are what a checkpoint reads and writes.
        self.by_key: dict[HistoryKey, Tensor] = dict(zip(delayed, self._values, strict=True))
        for scale, value in zip(self._scales_of, self._scales, strict=True):
            scale.value = value

    @contextmanager
    def recording(self, num_tokens: int) -> Iterator[None]:
        """Record the amaxes of all casts of a step, whose loss is a mean over `num_tokens`."""
        self._recorded.zero_()
        for unit in self._units:  # that of all, if there are any
            unit.fill_(2.0 ** math.floor(math.log2(num_tokens)))
        for scale, recorded in zip(self._scales_of, self._recorded, strict=True):
            scale.recorded = recorded
        try:
            yield
        finally:
            for scale in self._scales_of:
                scale.recorded = None

    def update(self, skipped: Tensor) -> None:
        """Move all histories on by what was recorded, unless the step is `skipped` (0-d bool).

        That of a tensor which is zero, or was not cast, stays as it is.
        """
        if not self.by_key:
            return
        amaxes = self._share(self._recorded)
        moved = torch.cat((amaxes[:, None], self._values[:, :-1]), dim=1)
        stays = skipped | (amaxes == 0)
        self._values.copy_(torch.where(stays[:, None], self._values, moved))
        self.refresh()

    def clear(self) -> None:
        """Forget all amaxes."""
        self._values.zero_()

    def refresh(self) -> None:
        """Take the scales from the histories, which may have been written to."""
        for fmt, rows in self._of_format.items():
            scales = scales_of_histories(self._values, self.precision, fmt)
            self._scales.copy_(torch.where(rows, scales, self._scales))


def scales_of_histories(values: Tensor, precision: PrecisionConfig, fmt: Format) -> Tensor:
    """Scales [n] of tensors in `fmt` with these histories [n, length]."""
    most_recent = precision.fp8_amax_compute_algo == "most_recent"
    amaxes = values[:, 0] if most_recent else values.amax(dim=1)
    return scale_from_amax(amaxes * 2.0**precision.fp8_margin, fmt)
