"""Reduce-scatter in two hops, so that little traffic crosses between nodes.

    within a node    rank j gets the contributions to all owners that are number j of their node,
                     and sums them in fp32
    between nodes    the node's sums, cast again with scales of their own, go to the owners
                     (one scale is that of the largest value of the whole tensor, not of the
                     rows that one rank holds; blocks lie in rows)

A flat all-to-all sends a gradient between nodes once per rank, this once per node, at the cost of
one more rounding of every sum that crosses; the sum of the owner's own node stays in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Handle, Wire, max_over_group
from fp8lm.gradient.reduction import Parts, cut, parts_of, reduce_scatter_fp32
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.shard_spec import LocalShards
from fp8lm.scaled_tensor import ScaledTensor

Sums = Sequence[Sequence[tuple[str, Tensor]]]  # by owner's node: names, and what was summed


class HierarchicalReduceScatter:
    """As `Fp32ReduceScatter` over `group`, whose rank r is number r % m of node r // m.

    `node` are the m ranks of this node, `across` those that are this number of their nodes.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        node: dist.ProcessGroup,
        across: dist.ProcessGroup,
        wire: Wire,
        kernels: Kernels,
        divisor: int | None = None,
    ) -> None:
        self.divisor = divisor or group.size()
        self.group, self.node, self.across = group, node, across
        self.wire = wire
        self.kernels = kernels

    def start(
        self, gradients: Mapping[str, ScaledTensor], rows: Sequence[LocalShards]
    ) -> Handle[dict[str, Tensor]]:
        """See `GradientReduction`; the second hop runs in `wait()`."""
        per_node, number = self.node.size(), self.node.rank()
        names, parts = cut(gradients, rows), parts_of(gradients, rows)
        device = next(iter(gradients.values())).device
        by_number = [
            [part for owned in parts[other::per_node] for part in owned]
            for other in range(per_node)
        ]
        held, like = names[number::per_node], parts[number::per_node]  # by node
        scaled = [name for name, gradient in gradients.items() if _has_one_scale(gradient)]
        shared = _held_by_several(scaled, names, per_node)

        def go_across(sums: list[Tensor]) -> dict[str, Tensor]:
            left = iter(sums)
            by_node = [[(name, next(left)) for name in owned] for owned in held]
            amaxes = self._amaxes(by_node, scaled, shared, device)
            means = self._mean_across(by_node, like, amaxes, device).wait()
            return dict(zip(names[self.group.rank()], means, strict=True))

        summing = reduce_scatter_fp32(by_number, self.node, self.wire, self.kernels, device)
        return summing.then(go_across)

    def _mean_across(
        self, by_node: Sums, like: Parts, amaxes: Mapping[str, Tensor], device: torch.device
    ) -> Handle[list[Tensor]]:
        """The second hop; `like` are the parts that were summed, which have their formats."""
        here = self.across.rank()
        sent = [
            [
                self.kernels.quantize(
                    total, part.format, amax=amaxes.get(name), granularity=part.granularity
                )
                for (name, total), part in zip(owned, parts, strict=True)
            ]
            if node != here
            else parts
            for node, (owned, parts) in enumerate(zip(by_node, like, strict=True))
        ]
        uncast = [total for _, total in by_node[here]]
        return reduce_scatter_fp32(
            sent,
            self.across,
            self.wire,
            self.kernels,
            device,
            uncast=uncast,
            divisor=self.divisor,
        )

    def _amaxes(
        self, by_node: Sums, scaled: Sequence[str], shared: Sequence[str], device: torch.device
    ) -> dict[str, Tensor]:
        """Of this node's sums of the tensors in `scaled`: whole tensors, whoever owns which rows.

        Ranks of the node hold parts of those that are `shared`, and tell each other.
        """
        found = {name: torch.zeros((), device=device) for name in scaled}
        for name, total in (pair for owned in by_node for pair in owned):
            if name in found:
                found[name] = torch.maximum(found[name], self.kernels.amax(total))
        if shared:
            own = torch.stack([found[name] for name in shared])
            largest = max_over_group(own, self.node, self.wire).wait()
            found |= zip(shared, largest.unbind(), strict=True)
        return found

    def finish_step(self, skipped: Tensor) -> None:
        """No state to update."""

    def named_tensors(self) -> dict[str, Tensor]:
        """No state."""
        return {}


def _has_one_scale(gradient: ScaledTensor) -> bool:
    return gradient.format.scaled and gradient.granularity.is_per_tensor


def _held_by_several(
    names: Sequence[str], by_owner: Sequence[Sequence[str]], per_node: int
) -> list[str]:
    """Those of `names` of which more than one rank of a node holds a part after the first hop."""
    numbers: dict[str, set[int]] = {name: set() for name in names}
    for owner, owned in enumerate(by_owner):
        for name in owned:
            if name in numbers:
                numbers[name].add(owner % per_node)
    return [name for name, holders in numbers.items() if len(holders) > 1]
