"""The main gradient of one weight, summed over micro-batches in its storage format.

    E4M3:   g <- quantize(dequantize(g) + dw)      one byte per parameter, scale just in time
    E2M5:   the same, with a scale per 128 elements
    BF16:   g <- bf16(g + dw)                      sum in fp32, rounded once per micro-batch
    FP32:   g <- g + dw

FP8-LM (arXiv 2310.18313, section 2.1) has E4M3. Every addition rounds the whole sum, so that many
micro-batches want the two more bits of mantissa that E2M5 has: see docs/concepts/numerics.md.

A NaN or Inf in any micro-batch makes its scale NaN, and a NaN scale stays NaN under further
accumulation, so nothing non-finite is ever forgotten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8lm.kernels.interface import Kernels
from fp8lm.numerics import FP32, Format, granularity_of
from fp8lm.scaled_tensor import ScaledTensor

# Of the sum, what is to be added, and whether the sum is empty; what it returns is called after.
SumObserver = Callable[[ScaledTensor, Tensor, bool], Callable[[], None]]


class MainGrad:
    """Accumulates weight gradients of `shape` into `value` (`ScaledTensor` in `fmt`).

    `observer` is called before every `add`, what it returns after it; neither may change anything
    or wait for the device.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        fmt: Format,
        kernels: Kernels,
        device: torch.device,
    ) -> None:
        self.value = ScaledTensor.zeros(shape, fmt, device, granularity_of(fmt, shape))
        self._elements = self.value.elements(0, self.value.payload.numel())
        self._kernels = kernels
        self._is_zero = True
        self.observer: SumObserver | None = None

    def zero(self) -> None:
        """Start a new sum. The buffer is not touched: the first `add` overwrites it."""
        self._is_zero = True

    @property
    def is_zero(self) -> bool:
        """Whether nothing was added since `zero`: the buffer still holds the sum before."""
        return self._is_zero

    def mark_added(self) -> None:
        """Something was added to the buffer without a call of `add`, by a replayed CUDA graph."""
        self._is_zero = False

    def add(self, dw: Tensor) -> None:
        """Add the gradient `dw` (bf16 or fp32, shape of the weight) of one micro-batch."""
        dw = dw.reshape(self._elements.shape)
        if self.observer is None:
            self._add(dw)
            return
        finish = self.observer(self._elements, dw, self._is_zero)
        self._add(dw)
        finish()

    def _add(self, dw: Tensor) -> None:
        total = self._elements
        if self._is_zero:
            granularity = total.granularity
            total.copy_(self._kernels.quantize(dw, total.format, granularity=granularity))
        else:
            self._kernels.accumulate_(total, dw)
        self._is_zero = False

    def add_rows(self, rows: Tensor, dw: Tensor) -> None:
        """Add `dw[i]` to row `rows[i]` (an embedding's gradient; fp32 buffers only).

        Frequent tokens collect thousands of terms, which only an fp32 sum keeps.
        """
        if self.value.format != FP32:
            raise TypeError(f"rows are accumulated in fp32, not in {self.value.format}")
        self.zero_if_unused()
        self._kernels.add_rows_(self.value.payload, rows, dw)

    def zero_if_unused(self) -> None:
        """Set `value` to zero if no gradient was added since `zero` (an unused weight)."""
        if self._is_zero:
            self.value.payload.zero_()
            self.value.scale.fill_(1.0)
            self._is_zero = False
