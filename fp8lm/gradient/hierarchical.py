"""Straight to the owner in two hops, so that little crosses between nodes.

    within a node    rank j gets the contributions to all owners that are number j of their node,
                     and sums them in fp32
    between nodes    the node's sums, cast again with scales of their own, go to the owners

A flat all-to-all sends a gradient between nodes once per rank, this once per node. The price is
one more rounding of every sum that crosses; the owner's own node's stays in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from fp8lm.comm import Handle, Wire
from fp8lm.gradient.reduction import Rows, cut, parts_of, sum_at_owners
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.scaled_tensor import ScaledTensor, quantize


class HierarchicalAccumulate:
    """As `Fp32Accumulate` over `group`, whose rank r is number r % m of node r // m.

    `node` are the m ranks of this node, `across` those that are this number of their nodes.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        node: dist.ProcessGroup,
        across: dist.ProcessGroup,
        wire: Wire,
        kernels: ReferenceKernels,
    ) -> None:
        self.group, self.node, self.across = group, node, across
        self.wire = wire
        self.kernels = kernels

    def start(
        self, gradients: Mapping[str, ScaledTensor], rows: Sequence[Rows]
    ) -> Handle[dict[str, Tensor]]:
        """See `GradientReduction`; the second hop runs in `wait()`."""
        per_node, names = self.node.size(), cut(gradients, rows)
        parts, device = parts_of(gradients, rows), next(iter(gradients.values())).device
        by_number = [
            [part for owned in parts[number::per_node] for part in owned]
            for number in range(per_node)
        ]
        mine = parts[self.node.rank() :: per_node]  # by node

        def go_across(sums: list[Tensor]) -> dict[str, Tensor]:
            left = iter(sums)
            by_node = [[next(left) for _ in owned] for owned in mine]
            here = self.across.rank()
            sent = [
                mine[node] if node == here else self._cast(totals, mine[node])
                for node, totals in enumerate(by_node)
            ]
            total = sum_at_owners(
                sent, self.across, self.wire, self.kernels, device, uncast=by_node[here]
            ).wait()
            own, size = names[self.group.rank()], self.group.size()
            return {name: value.div_(size) for name, value in zip(own, total, strict=True)}

        summing = sum_at_owners(by_number, self.node, self.wire, self.kernels, device)
        return summing.then(go_across)

    def _cast(self, totals: list[Tensor], like: list[ScaledTensor]) -> list[ScaledTensor]:
        return [
            quantize(total, part.format, self.kernels)
            for total, part in zip(totals, like, strict=True)
        ]

    def finish_step(self, skipped: Tensor) -> None:
        """Nothing depends on it."""

    def named_tensors(self) -> dict[str, Tensor]:
        """Nothing is remembered from step to step."""
        return {}
