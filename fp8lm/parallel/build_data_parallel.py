"""Builds data parallelism from the config: gradient reduction, state sharding and amax sharing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fp8lm.comm import Wire, WireCounter, max_over_group, reduce_scatter_fp8, sums_fp8
from fp8lm.comm.groups import ParamGroup, ProcessGroups, node_groups, processes_per_node
from fp8lm.config import Config
from fp8lm.gradient.buckets import GradientBuckets, ShardedReduction
from fp8lm.gradient.fp8_sum import AutoScaler, Fp8Sum
from fp8lm.gradient.hierarchical import HierarchicalReduceScatter
from fp8lm.gradient.reduction import Fp32ReduceScatter, GradientReduction
from fp8lm.kernels import Kernels
from fp8lm.layers.param import Param, by_group
from fp8lm.numerics import E4M3
from fp8lm.parallel.data_parallel import DistributedDataParallel, NoDataParallel
from fp8lm.parallel.distributed_optimizer import ShardedParams, ZeroDataParallel, shard_params
from fp8lm.parallel.param_buffer import ParamBuffer


def build_data_parallel(
    config: Config,
    groups: ProcessGroups,
    param_groups: Mapping[str, ParamGroup],
    kernels: Kernels,
    counter: WireCounter,
    weights: dict[str, Param],
) -> NoDataParallel:
    """Data parallelism as config section `parallel` describes it, by parameter group."""
    parallel, wire = config.parallel, config.precision.wire
    if groups.dims.dp == 1:
        return NoDataParallel(weights)
    grads = Wire.of_key("grads", wire, counter)
    sharded: dict[str, ShardedParams] = {}
    reductions: dict[str, ShardedReduction] = {}
    for name, params in by_group(weights).items():
        group = param_groups[name]
        sharded[name] = shard_params(parallel, params, group.reduce_group.size())
        reduction = build_reduction(config, groups, group, kernels, grads, params)
        reductions[name] = ShardedReduction(reduction, sharded[name].rows)
    buckets = GradientBuckets(
        weights, reductions, parallel.ddp_bucket_size, overlap=parallel.overlap_grad_reduce
    )
    if not parallel.use_distributed_optimizer:
        return DistributedDataParallel(weights, buckets, param_groups)
    # Weights that are not FP8 are sent in their storage format.
    sent = wire.of("params") if config.precision.params_dtype == "fp8_e4m3" else "fp8"
    params_wire = Wire("params", sent, counter)
    buffers = build_buffers(weights, sharded, param_groups, params_wire, kernels)
    return ZeroDataParallel(weights, buffers, buckets)


def build_buffers(
    weights: Mapping[str, Param],
    sharded: Mapping[str, ShardedParams],
    param_groups: Mapping[str, ParamGroup],
    wire: Wire,
    kernels: Kernels,
) -> list[ParamBuffer]:
    """A buffer for every part of `sharded`, in the order of forward."""
    number = {name: i for i, name in enumerate(weights)}
    buffers = [
        ParamBuffer(part, layout, param_groups[group].reduce_group, wire, kernels)
        for group, own in sharded.items()
        for part, layout in zip(own.parts, own.layouts, strict=True)
    ]
    return sorted(buffers, key=lambda buffer: number[buffer.names[0]])


def build_reduction(
    config: Config,
    groups: ProcessGroups,
    param_group: ParamGroup,
    kernels: Kernels,
    wire: Wire,
    params: dict[str, Param],
) -> GradientReduction:
    """The reduction that `precision.grad_reduce` names, for `params` of one `param_group`."""
    kind, group = config.precision.grad_reduce, param_group.reduce_group
    if kind == "fp32_accumulate":
        # Each rank knows its own machine only; all ranks must choose alike.
        given = config.parallel.node_size
        size = given or processes_per_node()
        nodes = None
        if size is not None:
            nodes = node_groups(groups, size, axis=param_group.axis, given=given is not None)
        if nodes is None:
            return Fp32ReduceScatter(group, wire, kernels, param_group.divisor)
        return HierarchicalReduceScatter(
            group, nodes.node, nodes.across, wire, kernels, param_group.divisor
        )
    names = [name for name, param in params.items() if param.spec.grad_format == E4M3]
    policy = {"fp8_sum": "automatic"}.get(kind, kind.removeprefix("fp8_"))
    device = next(iter(params.values())).model_param.device
    scaling = AutoScaler(names, group.size(), policy, device)
    native = reduce_scatter_fp8 if sums_fp8(group, device) else None
    return Fp8Sum(
        group, param_group.amax_group, wire, kernels, scaling, native, param_group.divisor
    )


def max_by_group(
    weights: Mapping[str, Param], param_groups: Mapping[str, ParamGroup], wire: Wire
) -> Callable[[Tensor], Tensor]:
    """The `max` of `OptimizerSharding`: row i of [W, n] over the ranks that hold `weights[i]`."""
    device = next(iter(weights.values())).model_param.device
    number = {name: i for i, name in enumerate(weights)}
    members = {
        group: torch.tensor([number[name] for name in params], device=device)
        for group, params in by_group(weights).items()
    }

    def largest(values: Tensor) -> Tensor:
        found = torch.empty_like(values)
        for group, rows in members.items():
            own = values.index_select(0, rows)
            shared = max_over_group(own, param_groups[group].amax_group, wire).wait()
            found.index_copy_(0, rows, shared)
        return found

    return largest
