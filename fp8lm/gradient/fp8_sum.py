"""Gradients summed in FP8 with automatic scaling (FP8-LM, arXiv 2310.18313, section 2.1).

    s_g   = min_i s_i, over g_i != 0                one shared scale per tensor      (eq. 4)
    g''_i = FP8(mu s_g g_i)                         mu in [2^-ceil(log2 N), 2]       (eq. 3, 5)
    g     = sum_i g''_i  /  (N s_g mu)              every sum rounded to FP8         (eq. 6)
                                                    (N here: `ParamGroup.divisor`)

mu is one number per tensor, applied as a power of two. It halves after a step in which more than
1e-5 of the reduced values are at the format's maximum, and grows otherwise, doubling in 1,000
steps. `pre_scaling` (mu = 1/N: no sum overflows, small values vanish) and `post_scaling` (mu = 1)
are the same arithmetic with mu fixed.

An all-zero gradient is left out of the minimum: its scale of 1 could flush the others to zero.

The sum is NCCL's own where it adds FP8 numbers, else a ring, requantized at every hop; gradients of
other formats are reduced by `Fp32ReduceScatter`. A rank sends (N-1)/N bytes per parameter, as in a
reduce-scatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Handle, MessageLayout, Wire, max_over_group, shift_bytes
from fp8lm.gradient.reduction import Fp32ReduceScatter, Parts, cut, parts_of
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.shard_spec import LocalShards
from fp8lm.numerics import Format
from fp8lm.scaled_tensor import ScaledTensor

SATURATION_LIMIT = 1e-5
GROWTH = 2.0 ** (1.0 / 1000.0)
LARGEST_MU = 2.0
POLICIES = ("automatic", "pre_scaling", "post_scaling")
_EXPONENT = 0x7F800000


class AutoScaler:
    """mu of every tensor, and the share of saturated values that moves it.

    `mu` and `saturated` are fp32 [tensors], in the order of `names`.
    """

    def __init__(
        self, names: Sequence[str], num_ranks: int, policy: str, device: torch.device
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"scaling is one of {POLICIES}, not {policy}")
        self.index = {name: i for i, name in enumerate(names)}
        self.policy = policy
        self.smallest = 2.0 ** -math.ceil(math.log2(num_ranks))
        start = 1.0 / num_ranks if policy == "pre_scaling" else 1.0
        self.mu = torch.full((len(names),), start, device=device)
        self.saturated = torch.zeros(len(names), device=device)

    def factors(self, names: Sequence[str]) -> Tensor:
        """mu of `names` rounded down to powers of two."""
        mu = torch.stack([self.mu[self.index[name]] for name in names])
        mu = mu.clamp(min=self.smallest)  # a loaded mu may be that of more ranks
        return (mu.view(torch.int32) & _EXPONENT).view(torch.float32)

    def update(self, skipped: Tensor) -> None:
        """Move every mu by its rule; a skipped step leaves it as it is."""
        if self.policy == "automatic":
            halved = self.saturated > SATURATION_LIMIT
            moved = torch.where(halved, self.mu * 0.5, self.mu * GROWTH)
            moved = moved.clamp(self.smallest, LARGEST_MU)
            self.mu.copy_(torch.where(skipped, self.mu, moved))


ReduceScatter = Callable[[Sequence[Tensor], Format, dist.ProcessGroup, Wire], Handle[Tensor]]


class Fp8Sum:
    """The mean over `group`, summed in FP8; `everyone` are all ranks with shards of the tensors.

    `scaling` names the tensors whose gradients are FP8. `native` sums them in one collective (see
    `reduce_scatter_fp8`); None: in a ring.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        everyone: dist.ProcessGroup,
        wire: Wire,
        kernels: Kernels,
        scaling: AutoScaler,
        native: ReduceScatter | None = None,
        divisor: int | None = None,
    ) -> None:
        self.group, self.everyone, self.native = group, everyone, native
        self.wire, self.kernels, self.scaling = wire, kernels, scaling
        self._others = Fp32ReduceScatter(group, wire, kernels, divisor)

    def start(
        self, gradients: Mapping[str, ScaledTensor], rows: Sequence[LocalShards]
    ) -> Handle[dict[str, Tensor]]:
        """See `GradientReduction`; the ring runs in `wait()`."""
        fp8 = {n: g for n, g in gradients.items() if n in self.scaling.index}
        others = {n: g for n, g in gradients.items() if n not in fp8}
        summing = self._others.start(others, rows) if others else Handle.done({})
        if not fp8:
            return summing
        reciprocals = torch.stack([_reciprocal_scale(gradient) for gradient in fp8.values()])
        sharing = max_over_group(reciprocals, self.group, self.wire)

        def add_up(means: dict[str, Tensor]) -> dict[str, Tensor]:
            largest = sharing.wait()
            shared = torch.where(largest == 0.0, 1.0, largest.reciprocal())
            return means | self._mean(fp8, shared * self.scaling.factors(list(fp8)), rows)

        return summing.then(add_up)

    def finish_step(self, skipped: Tensor) -> None:
        """Share the saturation counts over all ranks, and update mu."""
        saturated = self.scaling.saturated
        saturated.copy_(max_over_group(saturated, self.everyone, self.wire).wait())
        self.scaling.update(skipped)
        saturated.zero_()

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor's mu by name; empty if mu is fixed."""
        if self.scaling.policy != "automatic":
            return {}
        mu = self.scaling.mu
        return {name: mu[index] for name, index in self.scaling.index.items()}

    def _mean(
        self, gradients: dict[str, ScaledTensor], scales: Tensor, rows: Sequence[LocalShards]
    ) -> dict[str, Tensor]:
        rank = self.group.rank()
        sent = {
            name: ScaledTensor(
                self.kernels.cast(self.kernels.dequantize(gradient), scale, gradient.format),
                scale,
                gradient.format,
            )
            for (name, gradient), scale in zip(gradients.items(), scales.unbind(), strict=True)
        }
        names, parts = cut(sent, rows), parts_of(sent, rows)
        sums = self._ring(parts) if self.native is None else self._at_once(parts, self.native)
        self._count(names[rank], sums)
        return {
            name: self.kernels.dequantize(total).div_(self._others.divisor)
            for name, total in zip(names[rank], sums, strict=True)
        }

    def _ring(self, parts: Parts) -> list[ScaledTensor]:
        rank, size = self.group.rank(), self.group.size()
        partial = list(parts[(rank - 1) % size])
        for hop in range(1, size):
            own = parts[(rank - hop - 1) % size]
            received = self._shift(partial, own)
            partial = [self.kernels.add_in_format(a, b) for a, b in zip(received, own, strict=True)]
        return partial

    def _at_once(self, parts: Parts, reduce_scatter: ReduceScatter) -> list[ScaledTensor]:
        nothing = torch.empty(0, dtype=torch.uint8, device=self.scaling.mu.device)
        codes = [torch.cat([nothing, *(part.payload.reshape(-1) for part in own)]) for own in parts]
        fmt = next(part.format for own in parts for part in own)
        own = parts[self.group.rank()]
        total = reduce_scatter(codes, fmt, self.group, self.wire).wait()
        pieces = total.split([part.payload.numel() for part in own])
        return [
            ScaledTensor(piece.view(part.shape), part.scale, fmt)
            for piece, part in zip(pieces, own, strict=True)
        ]

    def _shift(
        self, partial: list[ScaledTensor], like: Sequence[ScaledTensor]
    ) -> list[ScaledTensor]:
        """Send `partial` to the next rank; what the previous one sends is laid out as `like`."""
        layout, device = MessageLayout.of(like), self.scaling.mu.device
        message = torch.empty(0, dtype=torch.uint8, device=device)
        if partial:
            message = MessageLayout.of(partial).pack(partial)
        size = layout.nbytes if like else 0
        received = shift_bytes(message, size, self.group, self.wire).wait()
        return layout.views(received) if like else []

    def _count(self, names: list[str], totals: list[ScaledTensor]) -> None:
        for name, total in zip(names, totals, strict=True):
            share = self.kernels.saturated_share(total)
            self.scaling.saturated[self.scaling.index[name]] = share


def _reciprocal_scale(gradient: ScaledTensor) -> Tensor:
    """1 / scale, 0 for nothing but zeros: the largest is that of the smallest scale that counts.

    NaN is larger than all (see `max_over_group`).
    """
    is_zero = (gradient.payload & 0x7F).max() == 0
    return torch.where(is_zero, 0.0, gradient.scale.reciprocal())


def ring_sum(terms: Sequence[ScaledTensor], owner: int, kernels: Kernels) -> ScaledTensor:
    """The sum that the ring over `terms` (one per rank, of one scale) brings to rank `owner`."""
    size = len(terms)
    total = terms[(owner + 1) % size]
    for hop in range(2, size + 1):
        total = kernels.add_in_format(total, terms[(owner + hop) % size])
    return total
