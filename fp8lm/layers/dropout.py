"""Dropout whose mask is a hash of the element's place in the run; there is no generator state.

    keep(element) = hash(seed, sample of the run, site in the model, element) >= rate

Where activations are replicated over ranks all of them drop the same elements, where the sequence
is split each rank drops those of its part, and a sample is treated alike under every layout and
in every micro-batch. Recomputing a layer draws the same mask, and a resumed run has no random
state to restore.

Shapes: S sequence (this rank's part), B micro-batch, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp8lm.kernels.rounding import noise_bits

_SITE_STEP = 0x632BE5AB
_SEED_STEP = 0x3C6EF372


@dataclass(frozen=True)
class DropoutNoise:
    """Hash keys of a micro-batch's samples (int32 [B]); the first position of this rank's part."""

    keys_B: Tensor
    first_position: int = 0

    @classmethod
    def of_samples(cls, samples_B: Tensor, seed: int, first_position: int = 0) -> DropoutNoise:
        """Noise of the samples with these numbers in the run (int64 [B])."""
        keys = noise_bits(samples_B.to(torch.int32), _as_int32(seed * _SEED_STEP + 1))
        return cls(keys, first_position)

    def at(self, site: int) -> DropoutNoise:
        """The noise of site number `site` below this one (a layer, or one of its dropouts)."""
        return replace(self, keys_B=noise_bits(self.keys_B, _as_int32((site + 1) * _SITE_STEP)))


def dropout(x_SBH: Tensor, rate: float, noise: DropoutNoise | None) -> Tensor:
    """Zero a share `rate` of the elements of `x` and divide the others by 1 - rate.

    Without noise, as in evaluation, `x` itself.
    """
    if noise is None or not rate:
        return x_SBH
    S, B, H = x_SBH.shape
    first = noise.first_position * H
    index = torch.arange(first, first + S * H, dtype=torch.int32, device=x_SBH.device)
    bits = noise_bits(index.view(S, 1, H).expand(S, B, H), noise.keys_B[:, None])
    dropped = bits < round(rate * 2**32) - 2**31
    return (x_SBH * (1.0 / (1.0 - rate))).masked_fill(dropped, 0.0)


def _as_int32(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
