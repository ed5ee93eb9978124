"""From a config to everything a run is made of."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.data import Dataset

from fp8lm.comm import Wire, WireCounter, all_gather_scalars
from fp8lm.comm.groups import ProcessGroups, node_groups
from fp8lm.comm.launch import Launch
from fp8lm.config import Config
from fp8lm.data.datasets import build_datasets
from fp8lm.data.tokenizer import Tokenizer, build_tokenizer, padded_vocab_size
from fp8lm.errors import InputError
from fp8lm.gradient.buckets import GradientBuckets
from fp8lm.gradient.fp8_sum import Fp8Sum, Scaling
from fp8lm.gradient.hierarchical import HierarchicalAccumulate
from fp8lm.gradient.reduction import Fp32Accumulate, GradientReduction
from fp8lm.kernels import ReferenceKernels, select_kernels
from fp8lm.layers.edge import ALONE, Partition
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.weight import Weight, named_weights
from fp8lm.model import GPTModel
from fp8lm.model.init import initial_value
from fp8lm.numerics import E4M3
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.optim.clipping import Exchange
from fp8lm.optim.schedule import BatchSize, LearningRate
from fp8lm.parallel import TensorParallel
from fp8lm.parallel.ownership import row_blocks, whole_tensors
from fp8lm.parallel.replicas import (
    OneReplica,
    PlainReplicas,
    ZeroReplicas,
    in_parts,
    tensors_of,
)
from fp8lm.parallel.weight_slabs import WeightSlabs

Divide = Callable[[dict[str, Weight]], OneReplica]


@dataclass(frozen=True)
class Run:
    """The parts of one run; `weights` are the model's by Megatron name, `sent` counts bytes."""

    config: Config
    groups: ProcessGroups
    device: torch.device
    tokenizer: Tokenizer
    vocab_size: int
    model: nn.Module
    weights: dict[str, Weight]
    optimizer: AdamW
    learning_rate: LearningRate
    batch_size: BatchSize
    datasets: tuple[Dataset | None, Dataset | None, Dataset | None]
    replicas: OneReplica
    sent: WireCounter

    @property
    def total_samples(self) -> int:
        """Samples of the whole run, over all ranks."""
        return _total_samples(self.config.train)

    @property
    def total_iterations(self) -> int:
        """Iterations of the whole run; with a ramp-up, counted by going through it."""
        if self.config.train.train_iters is not None:
            return self.config.train.train_iters
        iterations = samples = 0
        while samples < self.total_samples:
            samples += self.batch_size.global_batch_size(samples)
            iterations += 1
        return iterations


def resolve_device(name: str) -> torch.device:
    """The device that `train.device` names; `auto` takes CUDA where there is one.

    Raises `InputError` for CUDA where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"train.device=cuda, but this PyTorch ({torch.__version__}) sees no GPU: check the "
            "driver and that PyTorch is a CUDA build, or use train.device=cpu"
        )
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def build_partition(
    config: Config, groups: ProcessGroups, kernels: ReferenceKernels, counter: WireCounter
) -> Partition:
    """How config section `parallel` divides layers over the ranks of `groups`."""
    parallel, wire = config.parallel, config.precision.wire
    if parallel.tensor_model_parallel_size == 1:
        return ALONE
    return TensorParallel(
        group=groups.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel,
        gather_wire=Wire("tp_gather", wire.gather, counter),
        reduce_wire=Wire("tp_reduce", wire.reduce, counter),
        kernels=kernels,
    )


def table_rows(config: Config, num_ids: int) -> int:
    """Rows of the embedding for `num_ids` tokens: padded so that every rank has as many.

    Where the tensor-parallel size divides `make_vocab_size_divisible_by`, padding does not depend
    on it, and a checkpoint loads under any such size.
    """
    multiple = math.lcm(
        config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )
    return padded_vocab_size(num_ids, multiple, tensor_parallel_size=1)


def build_model(
    config: Config,
    vocab_size: int,
    kernels: ReferenceKernels,
    device: torch.device,
    *,
    num_ids: int | None = None,
    partition: Partition = ALONE,
    divide: Divide | None = None,
    exchange: Exchange | None = None,
) -> tuple[GPTModel, AdamW, OneReplica]:
    """The model with initial weights, the optimizer that holds their states, and its replicas.

    `vocab_size` is the padded one, `num_ids` how many of them are tokens (default: all). `divide`
    makes the replicas (default: one) of the model's weights; `exchange` as in `AdamW`.
    """
    model = GPTModel(
        config.model,
        vocab_size,
        Recipe.from_config(config.precision, kernels, device, partition),
        config.train.recompute_granularity,
        num_ids,
        config.train.seed,
    )
    precision = StatePrecision.from_config(config.precision)
    weights, seed = named_weights(model), config.train.seed
    replicas = (divide or OneReplica)(weights)
    optimizer = AdamW(
        weights,
        config.optimizer,
        precision,
        kernels,
        seed=seed,
        partition=partition,
        owned=replicas.owned,
        exchange=exchange,
        counts_in_norm=replicas.counts_in_norm,
    )
    for name, weight in weights.items():
        optimizer.initialize(name, initial_value(name, weight.spec, seed))
    if config.parallel.overlap_param_gather and isinstance(replicas, ZeroReplicas):
        replicas.overlap_gather(model)
    return model, optimizer, replicas


def build_replicas(
    config: Config,
    groups: ProcessGroups,
    kernels: ReferenceKernels,
    counter: WireCounter,
    weights: dict[str, Weight],
) -> OneReplica:
    """How config section `parallel` divides gradients and states over `groups.data_parallel`."""
    parallel, wire, group = config.parallel, config.precision.wire, groups.data_parallel
    if group.size() == 1:
        return OneReplica(weights)
    place = {"tensor": whole_tensors, "even": row_blocks}[parallel.partition]
    # Forward can only begin with the first weights if these travel apart from the last.
    size = parallel.ddp_bucket_size if parallel.overlap_param_gather else None
    parts = [(part, place(tensors_of(part), group.size())) for part in in_parts(weights, size)]
    rows = [
        {name: span for _, ownership in parts for name, span in ownership.rows[rank].items()}
        for rank in range(group.size())
    ]
    buckets = GradientBuckets(
        weights,
        rows,
        build_reduction(config, groups, kernels, Wire("grads", wire.grads, counter), weights),
        parallel.ddp_bucket_size,
        overlap=parallel.overlap_grad_reduce,
    )
    if not parallel.use_distributed_optimizer:
        return PlainReplicas(weights, buckets, group.rank())
    # Weights that are not FP8 travel as they are stored.
    sent = wire.params if config.precision.params_dtype == "fp8_e4m3" else "fp8"
    params = Wire("params", sent, counter)
    slabs = [WeightSlabs(part, ownership, group, params, kernels) for part, ownership in parts]
    return ZeroReplicas(weights, slabs, buckets)


def build_reduction(
    config: Config,
    groups: ProcessGroups,
    kernels: ReferenceKernels,
    wire: Wire,
    weights: dict[str, Weight],
) -> GradientReduction:
    """How `precision.grad_reduce` adds gradients over `groups.data_parallel`."""
    kind, group = config.precision.grad_reduce, groups.data_parallel
    if kind == "fp32_accumulate":
        launched = Launch.from_environment(os.environ)
        nodes = node_groups(groups, config.parallel.node_size or launched.local_world_size)
        if nodes is None:
            return Fp32Accumulate(group, wire, kernels)
        return HierarchicalAccumulate(group, nodes.node, nodes.across, wire, kernels)
    names = [name for name, weight in weights.items() if weight.spec.grad_format == E4M3]
    policy = {"fp8_sum": "automatic"}.get(kind, kind.removeprefix("fp8_"))
    device = next(iter(weights.values())).compute.device
    scaling = Scaling(names, group.size(), policy, device)
    return Fp8Sum(group, groups.world, wire, kernels, scaling)


def build(config: Config, groups: ProcessGroups, device: torch.device) -> Run:
    """All parts of the run `config` describes, on `device`; `InputError` for bad data."""
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    _check_batches(config, groups.data_parallel.size())
    tokenizer = build_tokenizer(config.tokenizer)
    vocab_size = table_rows(config, tokenizer.vocab_size)
    datasets = build_datasets(config, tokenizer, _dataset_sizes(config))
    kernels = select_kernels(device)
    counter = WireCounter(("grads", "params", "tp_gather", "tp_reduce"))
    scalars = Wire("grads", "fp32", counter)
    model, optimizer, replicas = build_model(
        config,
        vocab_size,
        kernels,
        device,
        num_ids=tokenizer.vocab_size,
        partition=build_partition(config, groups, kernels, counter),
        divide=partial(build_replicas, config, groups, kernels, counter),
        exchange=partial(all_gather_scalars, group=groups.world, wire=scalars),
    )
    return Run(
        config=config,
        groups=groups,
        device=device,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        model=model,
        weights=optimizer.weights,
        optimizer=optimizer,
        learning_rate=LearningRate(config.optimizer, config.scheduler, config.train),
        batch_size=BatchSize(config.train, groups.data_parallel.size()),
        datasets=datasets,
        replicas=replicas,
        sent=counter,
    )


def _check_batches(config: Config, replicas: int) -> None:
    train = config.train
    share = train.micro_batch_size * replicas
    of = f"train.micro_batch_size = {train.micro_batch_size} times {replicas} data-parallel ranks"
    if train.global_batch_size % share:
        raise InputError(
            f"train.global_batch_size = {train.global_batch_size} is not divisible by {of}: use a "
            f"multiple of {share}, or another number of processes"
        )
    start, increment, _ = train.rampup_batch_size or (share, share, 0)
    if start % share or increment % share:
        raise InputError(
            f"train.rampup_batch_size = {list(train.rampup_batch_size)}: start and increment must "
            f"be multiples of {of}"
        )


def _dataset_sizes(config: Config) -> tuple[int, int, int]:
    # A last step may reach beyond the run's samples by less than one batch.
    train = _total_samples(config.train) + config.train.global_batch_size
    evaluation = config.train.eval_iters * config.train.global_batch_size
    shares = [float(share) for share in config.data.split.split(",")] + [0.0, 0.0]
    return train, evaluation * (shares[1] > 0), evaluation * (shares[2] > 0)


def _total_samples(train) -> int:  # noqa: ANN001
    if train.train_samples is not None:
        return train.train_samples
    return train.train_iters * train.global_batch_size
