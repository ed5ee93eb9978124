"""Builds all parts of a run from its config."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from fp8lm.batch import Batch
from fp8lm.comm import WireCounter
from fp8lm.comm.groups import ProcessGroups
from fp8lm.config import Config
from fp8lm.data.batches import SizedDataset
from fp8lm.data.datasets import Datasets, build_datasets
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.kernels import select_kernels
from fp8lm.kernels.cuda_graph import GraphCapture
from fp8lm.kernels.select import check_scaling
from fp8lm.layers.amax_history import AmaxHistories
from fp8lm.layers.param import Param
from fp8lm.layers.recipe import Recipe
from fp8lm.model import GPTModel
from fp8lm.model.objectives import MeanOfMicrobatches, Objective
from fp8lm.model.preference import PreferenceOptimization
from fp8lm.optim import AdamW
from fp8lm.optim.schedule import BatchSize, LearningRate
from fp8lm.parallel.cuda_graphs import check_cuda_graphs, check_nccl, cuda_graphs
from fp8lm.parallel.data_parallel import NoDataParallel
from fp8lm.parallel.parallelize import build_tp_context, parallelize, stage_specs
from fp8lm.parallel.pipeline import Executor
from fp8lm.runtime.allocator import keep_freed_blocks
from fp8lm.telemetry.guard import Guard
from fp8lm.telemetry.observing import linears_of
from fp8lm.training.builders import (
    build_data,
    build_model,
    build_objective,
    build_optimizer,
    model_vocab_size,
)
from fp8lm.training.reference import Reference, build_reference
from fp8lm.training.run_length import check_batches, dataset_sizes


@dataclass(frozen=True)
class Run:
    """The parts of one run; `weights` are the model's by Megatron name, `sent` counts bytes.

    `histories` are those of delayed scaling, none with another. `reference` is the frozen model of
    preference training, where no file has its log-probabilities.
    """

    config: Config
    groups: ProcessGroups
    device: torch.device
    tokenizer: Tokenizer
    vocab_size: int
    model: GPTModel | nn.ModuleList
    weights: dict[str, Param]
    objective: Objective
    optimizer: AdamW
    learning_rate: LearningRate
    batch_size: BatchSize
    datasets: Datasets
    dataset_sizes: tuple[int, int, int]
    data_parallel: NoDataParallel
    pipeline: Executor
    shared_params: frozenset[str]
    histories: AmaxHistories
    sent: WireCounter
    reference: Reference | None = None

    @property
    def chunks(self) -> list[GPTModel]:
        """This rank's parts of the model, one unless the schedule is interleaved."""
        return [self.model] if isinstance(self.model, GPTModel) else [*self.model]

    @property
    def train_dataset(self) -> SizedDataset:
        """The training samples; RuntimeError where none are left to train on."""
        if self.datasets[0] is None:
            raise RuntimeError("this run has no training samples left")
        return self.datasets[0]

    def with_reference(self, microbatches: Iterable[Batch]) -> Iterable[Batch]:
        """`microbatches` with the losses of the reference, if the run has one."""
        return microbatches if self.reference is None else self.reference.attach(microbatches)

    @property
    def training_objective(self) -> Objective:
        """`objective` weighted as in training steps; evaluation weighs all tokens the same."""
        if self.config.train.calculate_per_token_loss:
            return self.objective
        return MeanOfMicrobatches(self.objective)


def build(
    config: Config,
    groups: ProcessGroups,
    device: torch.device,
    capture: GraphCapture | None = None,
) -> Run:
    """All parts of the run `config` describes, on `device`; `InputError` for bad data.

    `capture` is what `train.enable_cuda_graph` captures with, CUDA graphs by default.
    """
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    if device.type == "cpu":
        keep_freed_blocks()
    check_batches(config, groups.dims.dp)
    data = build_data(config)
    num_ids = data.tokenizer.vocab_size
    vocab_size = model_vocab_size(config, num_ids)
    check_scaling(device, config)
    capture = build_capture(config, groups, device, capture)
    kernels, counter = select_kernels(device, config.precision.kernels), WireCounter()
    tp = build_tp_context(config, groups, kernels, counter)
    recipe = Recipe.from_config(config.precision, kernels, device, tp)
    chunks = [
        build_model(config, vocab_size, recipe, part)
        for part in stage_specs(config, groups.pipeline_parallel.rank())
    ]
    parallel = parallelize(config, groups, chunks, kernels, counter, device, capture)
    optimizer = build_optimizer(config, parallel.weights, kernels, parallel.sharding)
    objective, reference = build_objective(config, num_ids, kernels, tp), None
    if isinstance(objective, PreferenceOptimization) and config.tuning.reference_logprobs is None:
        stage = groups.pipeline_parallel.rank()
        reference = build_reference(
            config, vocab_size, kernels, device, objective, parallel.pipeline, counter, stage
        )
    return Run(
        config=config,
        groups=groups,
        device=device,
        tokenizer=data.tokenizer,
        vocab_size=vocab_size,
        model=chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks),
        weights=parallel.weights,
        objective=objective,
        optimizer=optimizer,
        learning_rate=LearningRate(config.optimizer, config.scheduler, config.train),
        batch_size=BatchSize(config.train, groups.dims.dp),
        datasets=data.datasets,
        dataset_sizes=data.sizes,
        data_parallel=parallel.data_parallel,
        pipeline=parallel.pipeline,
        shared_params=parallel.shared_params,
        histories=parallel.histories,
        sent=counter,
        reference=reference,
    )


def build_capture(
    config: Config, groups: ProcessGroups, device: torch.device, given: GraphCapture | None
) -> GraphCapture | None:
    """What micro-batches are captured with: `given`, else CUDA graphs; None if none is captured."""
    if not config.train.enable_cuda_graph:
        return None
    check_cuda_graphs(config, groups)
    if given is None:
        given = cuda_graphs(device)
        check_nccl(groups, os.environ)
    return given


def build_guard(run: Run) -> Guard | None:
    """The guard of the run's FP8 GEMMs, if section `precision` has one."""
    config = run.config.precision.guard
    return None if config.action == "off" else Guard(config, linears_of(run.chunks))


def resize_datasets(run: Run, iteration: int, consumed_samples: int) -> Run:
    """`run` with datasets for the steps after `iteration`, whose batch size may have changed."""
    config = run.config
    sizes = dataset_sizes(config, iteration, consumed_samples)
    if sizes == run.dataset_sizes:
        return run
    datasets = build_datasets(config, run.tokenizer, sizes)
    return replace(run, datasets=datasets, dataset_sizes=sizes)
