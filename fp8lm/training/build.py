"""From a config to everything a run is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from fp8lm.comm import WireCounter
from fp8lm.comm.groups import ProcessGroups
from fp8lm.config import Config
from fp8lm.data.batches import SizedDataset
from fp8lm.data.datasets import Datasets, build_datasets
from fp8lm.data.tokenizer import Tokenizer, build_tokenizer, padded_vocab_size
from fp8lm.devices import NO_ROCM
from fp8lm.kernels import Kernels, select_kernels
from fp8lm.layers.param import Param, named_params
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.tp_context import NO_TP, TPContext
from fp8lm.model import GPTModel
from fp8lm.model.gpt import StageSpec
from fp8lm.model.init import initial_value
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.optim.schedule import BatchSize, LearningRate
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.parallel.data_parallel import NoDataParallel
from fp8lm.parallel.parallelize import build_tp_context, parallelize, stage_specs
from fp8lm.parallel.pipeline import Executor
from fp8lm.runtime.errors import InputError
from fp8lm.training.provenance import kept_tokenizer
from fp8lm.training.run_length import check_batches, dataset_sizes


@dataclass(frozen=True)
class Run:
    """The parts of one run; `weights` are the model's by Megatron name, `sent` counts bytes."""

    config: Config
    groups: ProcessGroups
    device: torch.device
    tokenizer: Tokenizer
    vocab_size: int
    model: GPTModel | nn.ModuleList
    weights: dict[str, Param]
    optimizer: AdamW
    learning_rate: LearningRate
    batch_size: BatchSize
    datasets: Datasets
    dataset_sizes: tuple[int, int, int]
    data_parallel: NoDataParallel
    pipeline: Executor
    shared_params: frozenset[str]
    sent: WireCounter

    @property
    def train_dataset(self) -> SizedDataset:
        """The training samples; RuntimeError where none are left to train on."""
        if self.datasets[0] is None:
            raise RuntimeError("this run has no training samples left")
        return self.datasets[0]


def resolve_device(name: str) -> torch.device:
    """The device that `train.device` names; `auto` takes CUDA where there is one.

    Raises `InputError` for CUDA where there is none, and for AMD's GPUs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"train.device=cuda, but this PyTorch ({torch.__version__}) sees no GPU: check the "
            "driver and that PyTorch is a CUDA build, or use train.device=cpu"
        )
    if name == "cuda" and torch.version.hip is not None:  # which answers for CUDA
        raise InputError(f"train.device=cuda: {NO_ROCM}")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def model_vocab_size(config: Config, num_ids: int) -> int:
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
    kernels: Kernels,
    device: torch.device,
    *,
    num_ids: int | None = None,
    tp: TPContext = NO_TP,
) -> tuple[GPTModel, AdamW, NoDataParallel]:
    """The whole model with initial weights, the optimizer of its states, and its one replica.

    `vocab_size` is the padded one, `num_ids` how many of them are tokens (default: all).
    """
    recipe = Recipe.from_config(config.precision, kernels, device, tp)
    model = gpt(config, vocab_size, num_ids, recipe)
    data_parallel = NoDataParallel(named_params(model))
    sharding = OptimizerSharding.build(data_parallel.weights, tp)
    return model, build_optimizer(config, data_parallel.weights, kernels, sharding), data_parallel


def gpt(
    config: Config,
    vocab_size: int,
    num_ids: int | None,
    recipe: Recipe,
    part: StageSpec | None = None,
) -> GPTModel:
    """`part` of the model (default: all), its weights zero."""
    train = config.train
    granularity, seed = train.recompute_granularity, train.seed
    return GPTModel(config.model, vocab_size, recipe, granularity, num_ids, seed, part)


def build_optimizer(
    config: Config,
    weights: dict[str, Param],
    kernels: Kernels,
    sharding: OptimizerSharding,
) -> AdamW:
    """The optimizer of `weights`, which get their initial values."""
    precision, seed = StatePrecision.from_config(config.precision), config.train.seed
    optimizer = AdamW(weights, config.optimizer, precision, kernels, seed=seed, sharding=sharding)
    for name, weight in weights.items():
        optimizer.initialize(name, initial_value(name, weight.spec, seed))
    return optimizer


def build(config: Config, groups: ProcessGroups, device: torch.device) -> Run:
    """All parts of the run `config` describes, on `device`; `InputError` for bad data."""
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    check_batches(config, groups.dims.dp)
    tokenizer = _tokenizer(config)
    vocab_size = model_vocab_size(config, tokenizer.vocab_size)
    sizes = dataset_sizes(config)
    datasets = build_datasets(config, tokenizer, sizes)
    kernels, counter = select_kernels(device), WireCounter()
    tp = build_tp_context(config, groups, kernels, counter)
    recipe = Recipe.from_config(config.precision, kernels, device, tp)
    chunks = [
        gpt(config, vocab_size, tokenizer.vocab_size, recipe, part)
        for part in stage_specs(config, groups.pipeline_parallel.rank())
    ]
    parallel = parallelize(config, groups, chunks, kernels, counter, device)
    optimizer = build_optimizer(config, parallel.weights, kernels, parallel.sharding)
    return Run(
        config=config,
        groups=groups,
        device=device,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        model=chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks),
        weights=parallel.weights,
        optimizer=optimizer,
        learning_rate=LearningRate(config.optimizer, config.scheduler, config.train),
        batch_size=BatchSize(config.train, groups.dims.dp),
        datasets=datasets,
        dataset_sizes=sizes,
        data_parallel=parallel.data_parallel,
        pipeline=parallel.pipeline,
        shared_params=parallel.shared_params,
        sent=counter,
    )


def _tokenizer(config: Config) -> Tokenizer:
    try:
        return build_tokenizer(config.tokenizer)
    except InputError as error:
        kept = kept_tokenizer(config.checkpoint)
        if kept is None:
            raise
        raise InputError(f"{error}; {kept}") from error


def resize_datasets(run: Run, iteration: int, consumed_samples: int) -> Run:
    """`run` with the samples that it reads from `iteration` on: others if its batch has changed."""
    config = run.config
    sizes = dataset_sizes(config, iteration, consumed_samples)
    if sizes == run.dataset_sizes:
        return run
    datasets = build_datasets(config, run.tokenizer, sizes)
    return replace(run, datasets=datasets, dataset_sizes=sizes)
