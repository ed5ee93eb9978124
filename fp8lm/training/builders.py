"""A run's parts, each from the config: device, tokenizer and data, model, optimizer, objective."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fp8lm.config import Config
from fp8lm.data.chat import keep_template
from fp8lm.data.datasets import Datasets, build_datasets
from fp8lm.data.instruction import chat_template
from fp8lm.data.tokenizer import Tokenizer, build_tokenizer, padded_vocab_size
from fp8lm.devices import NO_ROCM
from fp8lm.kernels import Kernels
from fp8lm.layers.param import Param, named_params, trainable
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.tp_context import NO_TP, TPContext
from fp8lm.model import GPTModel
from fp8lm.model.decoder import StageSpec
from fp8lm.model.init import initial_value
from fp8lm.model.objectives import AnswerModeling, LanguageModeling, Objective
from fp8lm.model.preference import PreferenceOptimization
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.runtime.errors import InputError
from fp8lm.training.provenance import kept_tokenizer
from fp8lm.training.run_length import dataset_sizes


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


@dataclass(frozen=True)
class RunData:
    """Tokenizer, datasets, and the `sizes` of these: samples for training, validation, test."""

    tokenizer: Tokenizer
    datasets: Datasets
    sizes: tuple[int, int, int]


def build_data(config: Config, sizes: tuple[int, int, int] | None = None) -> RunData:
    """What sections `data` and `tokenizer` name; by default as many samples as the run reads.

    A collective of all processes. `InputError` if they cannot be read.
    """
    tokenizer = _tokenizer(config)
    if config.train.objective != "pretrain":
        keep_template(tokenizer, chat_template(config, tokenizer))
    sizes = dataset_sizes(config) if sizes is None else sizes
    return RunData(tokenizer, build_datasets(config, tokenizer, sizes), sizes)


def _tokenizer(config: Config) -> Tokenizer:
    try:
        return build_tokenizer(config.tokenizer)
    except InputError as error:
        kept = kept_tokenizer(config.checkpoint)
        if kept is None:
            raise
        raise InputError(f"{error}; {kept}") from error


def model_vocab_size(config: Config, num_ids: int) -> int:
    """Rows of the embedding for `num_ids` tokens, padded to the same number on every rank.

    Where the tensor-parallel size divides `make_vocab_size_divisible_by`, padding does not depend
    on it, and a checkpoint loads under any such size.
    """
    multiple = math.lcm(
        config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )
    return padded_vocab_size(num_ids, multiple, tensor_parallel_size=1)


def build_model(
    config: Config, vocab_size: int, recipe: Recipe, part: StageSpec | None = None
) -> GPTModel:
    """`part` of the model (default: all), its weights zero; `vocab_size` is the padded one."""
    train = config.train
    granularity, seed = train.recompute_granularity, train.seed
    return GPTModel(config.model, vocab_size, recipe, granularity, seed, part)


def build_objective(
    config: Config, num_ids: int, kernels: Kernels, tp: TPContext = NO_TP
) -> Objective:
    """What `train.objective` names, for a vocabulary of `num_ids` tokens."""
    if config.train.objective == "sft":
        return AnswerModeling(num_ids, tp, kernels)
    if config.train.objective == "dpo":
        tuning = config.tuning
        return PreferenceOptimization(
            num_ids,
            tp,
            kernels,
            beta=tuning.beta,
            loss_type=tuning.loss_type,
            label_smoothing=tuning.label_smoothing,
            length_normalized=tuning.length_normalized,
            sft_loss_weight=tuning.sft_loss_weight,
        )
    return LanguageModeling(num_ids, tp, kernels)


def build_optimizer(
    config: Config,
    weights: dict[str, Param],
    kernels: Kernels,
    sharding: OptimizerSharding,
) -> AdamW:
    """Give all `weights` their initial values; returns the optimizer of those not frozen."""
    precision, seed = StatePrecision.from_config(config.precision), config.train.seed
    trained = trainable(weights)
    optimizer = AdamW(trained, config.optimizer, precision, kernels, seed=seed, sharding=sharding)
    for name, weight in weights.items():
        value = initial_value(name, weight.spec, seed)
        if name in trained:
            optimizer.initialize(name, value)
        else:
            weight.set_value(value)
    return optimizer


def build_one_process(
    config: Config,
    vocab_size: int,
    kernels: Kernels,
    device: torch.device,
    tp: TPContext = NO_TP,
) -> tuple[GPTModel, AdamW]:
    """The whole model with initial weights and its optimizer, without data or process groups."""
    recipe = Recipe.from_config(config.precision, kernels, device, tp)
    model = build_model(config, vocab_size, recipe)
    weights = named_params(model)
    sharding = OptimizerSharding.build(trainable(weights), tp)
    return model, build_optimizer(config, weights, kernels, sharding)
