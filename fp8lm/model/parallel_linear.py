"""The two kinds of linear layers in a transformer block, by where their features are split.

    column   splits its output: activations come in through the boundary edge
    row      splits its input: partial sums leave through the boundary edge

On one rank both are the plain layer.
"""

from __future__ import annotations

from fp8lm.layers.linear import Linear
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.weight import Initializer, vector_spec
from fp8lm.model.init import matrix_spec


def column_linear(
    out_features: int,
    in_features: int,
    init: Initializer,
    recipe: Recipe,
    *,
    bias: bool,
    parts: int = 1,
) -> Linear:
    """[S/t,B,I] or [S,B,I] -> [S,B,O/t]; `parts` sections of the output are split separately."""
    partition = recipe.partition
    split = partition.split(0, parts)
    return Linear(
        matrix_spec(out_features, in_features, init, recipe, split),
        precision=recipe.gemm,
        kernels=recipe.kernels,
        device=recipe.device,
        bias=vector_spec(out_features, 0.0, recipe.dense, split=split) if bias else None,
        input_edge=partition.boundary(),
        output_edge=partition.inside(),
    )


def row_linear(
    out_features: int, in_features: int, init: Initializer, recipe: Recipe, *, bias: bool
) -> Linear:
    """[S,B,I/t] -> [S/t,B,O] or [S,B,O]; the bias is added once, after the sum over ranks."""
    partition = recipe.partition
    partial_grad = partition.sequence_parallel
    return Linear(
        matrix_spec(out_features, in_features, init, recipe, partition.split(1)),
        precision=recipe.gemm,
        kernels=recipe.kernels,
        device=recipe.device,
        bias=vector_spec(out_features, 0.0, recipe.dense, partial_grad=partial_grad)
        if bias
        else None,
        input_edge=partition.inside(),
        output_edge=partition.boundary(),
    )
