"""A norm or an activation that a linear layer applies to its input before quantizing it.

    forward    y = f(x)    x8 = quantize(y)         y is not kept
    backward   dx = f'(x) dy                        dy is dgrad's output

A prologue is a part of the layer's one autograd function, as in TransformerEngine's
LayerNormLinear and LayerNormMLP: no autograd node and no high-precision tensor lies between it and
the cast, so a kernel can do both in one pass. Under sequence parallelism it works on this rank's
tokens, and the group's amax is found between it and the cast.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Prologue(Protocol):
    """`f` and its gradient; both run without autograd."""

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """Parameters of `f` that get gradients from `backward_from`."""

    def forward_saving(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`f(x)`, and the tensors to save for `backward_from`."""

    def backward_from(
        self, saved: tuple[Tensor, ...], dy: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of `x` and of every tensor in `differentiated`.

        `residual` is the gradient of `x` from the path around the layer, and is added to the first.
        """
