"""Which ranks share a parameter: a rule per group of parameters.

    group     replicas: gradients, states    all that hold a part of it: amaxes
    dense     dp                             tp x dp
    expert    expert_dp                      tp x expert_dp

(axes of `ParallelDims`, within a pipeline stage). An expert's gradient has the tokens in it that
the ranks of its `ep` group sent to it, and the loss is the mean over all `dp` replicas: whatever
the number of summands, a sum is divided by dp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from fp8lm.comm.groups import ProcessGroups

DENSE, EXPERT = "dense", "expert"
REPLICA_AXIS = {DENSE: "dp", EXPERT: "expert_dp"}


@dataclass(frozen=True)
class ParamGroup:
    """The ranks that share the parameters of group `name` with this one.

    `reduce_group`: the replicas, over which gradients are summed, then divided by `divisor`, and
    optimizer states sharded. `amax_group`: all ranks that hold a part of the same parameters.
    """

    name: str
    reduce_group: dist.ProcessGroup
    amax_group: dist.ProcessGroup
    divisor: int

    @property
    def axis(self) -> str:
        """The axis of `ParallelDims` along which the replicas are."""
        return REPLICA_AXIS[self.name]

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank counts what all replicas hold, as gradients in the norm."""
        return self.reduce_group.rank() == 0


def build_param_groups(groups: ProcessGroups) -> dict[str, ParamGroup]:
    """Every group by its name; a collective of all processes."""
    dims = groups.dims
    if dims.cp > 1:
        raise NotImplementedError("context-parallel ranks hold replicas too, in no group yet")
    stage = groups.world if dims.pp == 1 else groups.divide(dims.rank_lists("tp", "dp"))
    dense = ParamGroup(DENSE, groups.data_parallel, stage, dims.dp)
    if dims.ep == 1:
        expert = ParamGroup(EXPERT, dense.reduce_group, dense.amax_group, dims.dp)
    else:
        replicas = groups.divide(dims.rank_lists("expert_dp"))
        holders = groups.divide(dims.rank_lists("tp", "expert_dp"))
        expert = ParamGroup(EXPERT, replicas, holders, dims.dp)
    return {DENSE: dense, EXPERT: expert}
