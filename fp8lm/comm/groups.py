"""The process groups of a run. A group of size one is an ordinary case.

Which ranks are in which group is `ParallelDims`' arithmetic. Which ranks share a parameter is a
rule per group of parameters (`ParamGroup`), along axes of `ParallelDims`, in a pipeline stage:

    parameters   replicas: gradients, states    all that hold a part: amaxes
    dense        dp                             tp x dp
    expert       expert_dp                      tp x expert_dp

An expert's gradient has the tokens in it that the ranks of its `ep` group sent to it, and the loss
is the mean over all `dp` replicas: whatever the number of summands, a sum is divided by dp.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from fp8lm.comm.dims import DENSE, EXPERT, REPLICA_AXIS, ParallelDims
from fp8lm.comm.env import DistEnv
from fp8lm.comm.rank_check import addresses_line, call_roll
from fp8lm.comm.store import job_store
from fp8lm.config import ParallelConfig
from fp8lm.devices import NO_NCCL
from fp8lm.runtime.addresses import INTERFACES
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.launchers import adopt_launcher
from fp8lm.runtime.streams import say

TIMEOUT = timedelta(minutes=10)
# A checkpoint's slowest file may take long; a rank that dies ends the wait for it all the same.
SAVING_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ProcessGroups:
    """Groups of this process along the axes of `dims`, passed to the code that communicates.

    `saving` has all ranks, over gloo, for checkpoints written in the background. `store` is the
    job's key-value store, None where the processes were not joined here.
    """

    dims: ParallelDims
    world: dist.ProcessGroup
    tensor_parallel: dist.ProcessGroup
    data_parallel: dist.ProcessGroup
    pipeline_parallel: dist.ProcessGroup
    saving: dist.ProcessGroup
    store: dist.Store | None = None
    timeout: timedelta = TIMEOUT
    made: list[dist.ProcessGroup] = field(default_factory=list)

    def divide(self, ranks: list[list[int]]) -> dist.ProcessGroup:
        """A group for each list of `ranks`, destroyed with the others; returns this process's."""
        return _joined(self.divide_some(ranks))

    def divide_some(self, ranks: list[list[int]]) -> dist.ProcessGroup | None:
        """As `divide`, but `ranks` may leave processes out, which get None."""
        group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=self.timeout)
        if group is not None:
            self.made.append(group)
        return group

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes for the whole run."""
        return self.world.rank() == 0


@contextmanager
def process_groups(
    device: torch.device,
    parallel: ParallelConfig | None = None,
    *,
    backend: str | None = None,
    timeout: timedelta = TIMEOUT,
) -> Iterator[ProcessGroups]:
    """Join the job that the launcher's environment describes, or make one of a single process.

    Config section `parallel` divides the processes (default: replicas of the whole model).
    `device` is this rank's own (see `rank_device`). The backend is NCCL for a GPU and gloo for
    the CPU. NCCL wants a GPU for each rank; to let several ranks share one, for tests, pass
    `backend="gloo"`: it moves bytes of GPU tensors through the host. A collective that takes longer
    than `timeout` fails. InputError, before any group is made, if the environment is incomplete or
    the sizes do not divide the number of processes.

    The groups of several processes outlive an exception: to destroy them is to wait for the other
    ranks, see `fp8lm.runtime.ending`.
    """
    adopt_launcher(os.environ)
    launch = DistEnv.from_environment(os.environ)
    dims = ParallelDims.from_config(parallel or ParallelConfig(), launch.world_size)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        if backend == "nccl" and not dist.is_nccl_available():
            raise InputError(NO_NCCL)
        torch.cuda.set_device(device)
    store = job_store(launch, timeout)
    if launch.world_size > 1 or os.environ.get(INTERFACES[0]):  # gloo listens there
        present = call_roll(store, launch, os.environ, _gpu(device, backend))
        if launch.rank == 0 and (line := addresses_line(present)):
            say(line)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )
    try:
        with model_parallel_groups(dims, store=store, timeout=timeout) as groups:
            yield groups
    except BaseException:
        if launch.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _gpu(device: torch.device, backend: str) -> str | None:
    """The UUID of this process's GPU with NCCL, where two processes may not share one."""
    if device.type != "cuda" or backend != "nccl":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


@contextmanager
def model_parallel_groups(
    dims: ParallelDims | None = None,
    *,
    store: dist.Store | None = None,
    timeout: timedelta = TIMEOUT,
) -> Iterator[ProcessGroups]:
    """Divide the processes of the job that this one has joined (default: all are replicas).

    Only the groups that this project uses are made, not the twenty of Megatron's
    `initialize_model_parallel`: a gloo group costs three threads that poll, an NCCL one memory.
    """
    dims = dims or ParallelDims.divide(dist.get_world_size())
    tp, dp, pp = (
        _joined(dist.new_subgroups_by_enumeration(dims.rank_lists(axis), timeout=timeout)[0])
        for axis in ("tp", "dp", "pp")
    )
    saving = dist.new_group(backend="gloo", timeout=SAVING_TIMEOUT)
    # Groups that `divide` makes later are appended to this list.
    made = [tp, dp, pp, saving]
    yield ProcessGroups(dims, _joined(dist.group.WORLD), tp, dp, pp, saving, store, timeout, made)
    # Not after an exception: other ranks may not come here. One that is not connected yet would
    # find a group's end closed.
    dist.monitored_barrier(saving, timeout=timeout)
    for group in made:
        dist.destroy_process_group(group)


def _joined(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """`group`, which must include this process (torch returns None for others)."""
    if group is None:
        raise RuntimeError("this process is in none of the groups")
    return group


@dataclass(frozen=True)
class NodeGroups:
    """Subgroups of a group by nodes of m ranks: rank r is number r % m of node r // m.

    `node`: the ranks of this node. `across`: the ranks with this number on all nodes.
    """

    node: dist.ProcessGroup
    across: dist.ProcessGroup


def node_groups(
    groups: ProcessGroups, node_size: int, *, axis: str = "dp", given: bool = True
) -> NodeGroups | None:
    """The group along `axis` by nodes of `node_size` processes; a collective of all processes.

    None for one rank per node, or one node. See `replicas_per_node`.
    """
    dims = groups.dims
    per_node = replicas_per_node(dims.size(axis), dims.stride(axis), node_size, given=given)
    if per_node is None:
        return None
    replicas = dims.rank_lists(axis)
    nodes = [r[i : i + per_node] for r in replicas for i in range(0, len(r), per_node)]
    numbers = [r[i::per_node] for r in replicas for i in range(per_node)]
    return NodeGroups(groups.divide(nodes), groups.divide(numbers))


def tensor_parallel_neighbours(groups: ProcessGroups, size: int) -> dist.ProcessGroup:
    """This process's part of the tensor-parallel group, cut into neighbours of `size`.

    A collective of all processes.
    """
    if size == groups.dims.tp:
        return groups.tensor_parallel
    lists = groups.dims.rank_lists("tp")
    return groups.divide([r[i : i + size] for r in lists for i in range(0, len(r), size)])


def processes_per_node() -> int | None:
    """Processes per machine, as the launcher says; a collective of all processes.

    None if machines have different numbers.
    """
    local = DistEnv.from_environment(os.environ).local_world_size
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, local)
    return local if len(set(sizes)) == 1 else None


def replicas_per_node(ranks: int, stride: int, node_size: int, *, given: bool) -> int | None:
    """How many of `ranks` data-parallel ranks sum within a node; None if it is one or all.

    The ranks are every `stride`th process. Pipeline stages need not begin at node boundaries, so
    nodes may hold different numbers: InputError if the user has `given` the size, else the largest
    number of neighbours that always lie on one node.
    """
    per_node = max(1, node_size // stride)
    if per_node == 1 or per_node >= ranks:
        return None
    if ranks % per_node == 0 and node_size % stride == 0:
        return per_node
    if given:
        raise InputError(
            f"parallel.node_size = {node_size} does not divide {ranks} data-parallel ranks of "
            f"{stride} processes evenly over nodes: set it to a size that does"
        )
    together = 1 if node_size % stride else math.gcd(per_node, ranks)
    return together if together > 1 else None


@dataclass(frozen=True)
class PipelineGroups:
    """The pipeline-parallel groups of this rank, as Megatron names them.

    Messages to a later stage use `pp_forward`, those to an earlier one `pp_backward`: NCCL runs the
    sends and receives of two ranks of one group in order, so that in a single group an activation
    would wait for a gradient that waits for it. `embd` holds the first and the last
    stage (None on the stages between).
    """

    pp_forward: dist.ProcessGroup
    pp_backward: dist.ProcessGroup
    embd: dist.ProcessGroup | None


def pipeline_groups(groups: ProcessGroups) -> PipelineGroups:
    """Groups that pipelines need beyond `groups`; a collective of all processes."""
    pipelines = groups.dims.rank_lists("pp")
    pp_backward = groups.divide(pipelines)
    embd = groups.divide_some([[ranks[0], ranks[-1]] for ranks in pipelines])
    return PipelineGroups(groups.pipeline_parallel, pp_backward, embd)


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
        """Whether this rank counts values that all replicas hold, such as gradients in the norm."""
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


def rank_device(device: torch.device, num_gpus: int | None = None) -> torch.device:
    """The device of this rank: the CPU, or GPU number LOCAL_RANK modulo the number of GPUs."""
    if device.type != "cuda":
        return device
    num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    return torch.device("cuda", DistEnv.from_environment(os.environ).local_rank % num_gpus)
