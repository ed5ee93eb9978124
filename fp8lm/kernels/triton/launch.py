"""The one place that launches kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fp8lm.kernels.cost import declare_launch

Grid = tuple[int] | tuple[int, int]


def launch(
    kernel: Any,  # a function under `triton.jit`, which has no useful type
    grid: Grid,
    *args: Tensor | int | float | tuple[Tensor, ...],
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    **constants: int | str,
) -> None:
    """Run `kernel` on `grid` programs; `reads` and `writes` are what it moves (see `kernels.cost`).

    `constants` are its compile-time arguments, `num_warps` and `maxnreg`. On the meta device
    nothing runs.
    """
    declare_launch(kernel.__name__, reads, writes)
    if not writes[0].is_meta:
        # A fused multiply-add rounds once where PyTorch rounds twice.
        kernel[grid](*args, enable_fp_fusion=False, **constants)
