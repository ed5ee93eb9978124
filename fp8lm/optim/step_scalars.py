"""The scalars that ranks share once per step, in one gather and one maximum.

gather   norm (two floats), token share, loss, stop request and the objective's metrics: of every
         rank, [ranks, 5 + metrics]
max      amax of every gradient and of every state, over the ranks with the same shards
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_GATHERED = 5


@dataclass(frozen=True)
class StepScalars:
    """One rank's part, 0-d tensors: `norm` in float64, the others fp32.

    `norm` is that of the gradients that count here, `token_share` the share of this rank's tokens
    that the loss counts, `stop` why to stop after the step (0: continue), `metrics` those of the
    objective.
    """

    norm: Tensor
    token_share: Tensor
    loss: Tensor
    stop: Tensor
    metrics: Sequence[Tensor] = ()

    @classmethod
    def of(
        cls,
        norm: Tensor,
        token_share: Tensor | None = None,
        loss: Tensor | None = None,
        stop: Tensor | None = None,
        metrics: Sequence[Tensor] = (),
    ) -> StepScalars:
        """By default all tokens count, without a loss, a request to stop or metrics."""
        zero = torch.zeros((), device=norm.device)
        return cls(
            norm,
            torch.ones_like(zero) if token_share is None else token_share,
            zero if loss is None else loss,
            zero if stop is None else stop,
            metrics,
        )

    def pack(self) -> Tensor:
        """The message, fp32 [NUM_GATHERED + metrics].

        The norm is sent as two floats whose sum it is: whatever rank and order squares are summed
        in, the total rounds to the same float then, and so does every byte that depends on it. The
        norm and not its square, because the square of a norm that is a float may be none.
        """
        high = self.norm.float()
        low = (self.norm - high.double()).float()
        return torch.stack((high, low, self.token_share, self.loss, self.stop, *self.metrics))


@dataclass(frozen=True)
class SharedScalars:
    """Of all ranks: `norm` and `token_share` 0-d float64, `losses` and `stops` fp32 [ranks].

    `metrics` are fp32 [ranks, metrics].
    """

    norm: Tensor
    token_share: Tensor
    losses: Tensor
    stops: Tensor
    metrics: Tensor

    @classmethod
    def unpack(cls, messages: Tensor) -> SharedScalars:
        """From the `pack` of every rank, [ranks, NUM_GATHERED + metrics]."""
        norm = messages[:, :2].double().sum(dim=1).square().sum().sqrt()
        # In double precision the mean of equal shares is that share, whatever the number of ranks.
        share = messages[:, 2].double().mean()
        return cls(norm, share, messages[:, 3], messages[:, 4], messages[:, NUM_GATHERED:])

    @property
    def finite(self) -> Tensor:
        """Whether the losses and requests of all ranks are finite numbers, 0-d bool."""
        return torch.isfinite(self.losses).all() & torch.isfinite(self.stops).all()
