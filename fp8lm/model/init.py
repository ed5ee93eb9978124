"""Initial weights: a pure function of the seed and a weight's name, whatever the layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from fp8lm.layers.param import Initializer, ParamSpec
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.shard_spec import REPLICATED, ShardSpec
from fp8lm.numerics import FP32


def normal_init(std: float) -> Initializer:
    """Normal with mean 0 and standard deviation `std`."""

    def init(tensor: Tensor, generator: torch.Generator) -> Tensor:
        return tensor.normal_(0.0, std, generator=generator)

    return init


def output_init(std: float, num_layers: int) -> Initializer:
    """As `normal_init`, over sqrt(2 * layers): for matrices that write to the residual stream."""
    return normal_init(std / math.sqrt(2.0 * num_layers))


def matrix_spec(
    out_features: int,
    in_features: int,
    init: Initializer,
    recipe: Recipe,
    shard_spec: ShardSpec = REPLICATED,
) -> ParamSpec:
    """Spec of a linear layer's weight [out, in] in the recipe's formats."""
    shape = (out_features, in_features)
    return ParamSpec(
        shape,
        init,
        recipe.weight,
        recipe.weight_grad,
        shard_spec=shard_spec,
        trainable=recipe.trainable,
    )


def table_spec(
    rows: int,
    size: int,
    init: Initializer,
    recipe: Recipe,
    shard_spec: ShardSpec = REPLICATED,
    *,
    sequence_parallel: bool = False,
) -> ParamSpec:
    """Spec of an embedding or output table [rows, size]: dense format, fp32 gradient."""
    shape = (rows, size)
    return ParamSpec(
        shape,
        init,
        recipe.high_precision,
        FP32,
        shard_spec=shard_spec,
        sequence_parallel=sequence_parallel,
        keep_high_precision=True,
        trainable=recipe.trainable,
    )


def initial_value(name: str, spec: ParamSpec, seed: int) -> Tensor:
    """The fp32 value of the whole logical weight `name` before the first step, on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return spec.init(torch.empty(spec.shape, dtype=torch.float32), generator)
