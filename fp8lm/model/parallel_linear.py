"""The two kinds of linear layers in a transformer block, by where their features are split.

    column   shards its output features: gathers its input
    row      shards its input features: reduces its output

On one rank both are the plain layer.
"""

from __future__ import annotations

from fp8lm.layers.linear import Linear
from fp8lm.layers.param import Initializer, vector_spec
from fp8lm.layers.recipe import Recipe
from fp8lm.model.init import matrix_spec


def column_linear(
    out_features: int,
    in_features: int,
    init: Initializer,
    recipe: Recipe,
    *,
    bias: bool,
    num_sections: int = 1,
) -> Linear:
    """[S/t,B,I] or [S,B,I] -> [S,B,O/t]; `num_sections`: see `ShardSpec`."""
    tp = recipe.tp
    shard_spec = tp.shard(0, num_sections)
    return Linear(
        matrix_spec(out_features, in_features, init, recipe, shard_spec),
        recipe,
        bias=vector_spec(out_features, 0.0, recipe.high_precision, shard_spec=shard_spec)
        if bias
        else None,
        input_comm=tp.replicated_side(),
        output_comm=tp.sharded_side(),
    )


def row_linear(
    out_features: int,
    in_features: int,
    init: Initializer,
    recipe: Recipe,
    *,
    bias: bool,
    smooth: bool = False,
) -> Linear:
    """[S,B,I/t] -> [S/t,B,O] or [S,B,O]; the bias is added once, after the sum over ranks.

    `smooth`: see `fp8lm.layers.smoothing`.
    """
    tp = recipe.tp
    sequence_parallel = tp.sequence_parallel
    return Linear(
        matrix_spec(out_features, in_features, init, recipe, tp.shard(1)),
        recipe,
        bias=vector_spec(
            out_features, 0.0, recipe.high_precision, sequence_parallel=sequence_parallel
        )
        if bias
        else None,
        input_comm=tp.sharded_side(),
        output_comm=tp.replicated_side(),
        smooth=smooth,
    )
