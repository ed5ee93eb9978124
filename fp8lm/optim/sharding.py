"""The optimizer's view of parallelism: the rows that a rank updates, and how ranks share scalars.

Reducing gradients to the owners and gathering parameters from them is data parallelism's
(`fp8lm.parallel.distributed_optimizer`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from torch import Tensor

from fp8lm.layers.param import Param
from fp8lm.layers.shard_spec import LocalShards
from fp8lm.layers.tp_context import NO_TP, TPContext


@dataclass(frozen=True)
class OptimizerSharding:
    """Rows (first dimension) of each parameter whose states this rank holds, by name.

    `gather` collects a vector of every rank that updates the model, [n] -> [ranks, n]. `max`
    reduces values of every parameter, [W, n], to their maximum (not negative; NaN wins) over the
    ranks that hold shards of that parameter. `norm_owner` says for each parameter whether its
    gradient counts in the norm here: of a gradient that several ranks hold, only one counts.
    """

    tp: TPContext
    local_shards: LocalShards
    norm_owner: Mapping[str, bool]
    gather: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]

    @classmethod
    def build(
        cls,
        params: Mapping[str, Param],
        tp: TPContext = NO_TP,
        *,
        local_shards: LocalShards | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        max: Callable[[Tensor], Tensor] | None = None,
        is_norm_owner: Callable[[str], bool] = lambda name: True,
        shared_params: Container[str] = (),
    ) -> OptimizerSharding:
        """By default one replica and one stage: all rows, scalars shared over `tp`.

        `is_norm_owner` is False for a gradient that another replica counts, `shared_params` are
        parameters that another pipeline stage counts.
        """
        if local_shards is None:
            local_shards = {name: (0, p.spec.local_shape[0]) for name, p in params.items()}
        norm_owner = {
            name: is_norm_owner(name)
            and name not in shared_params
            and (tp.rank == 0 or not param.spec.shard_spec.is_whole)
            for name, param in params.items()
        }
        return cls(tp, local_shards, norm_owner, gather or tp.gather, max or tp.max)
