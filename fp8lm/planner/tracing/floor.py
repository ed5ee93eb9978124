"""The bytes that an ideally fused layer still moves outside of its GEMMs and attention.

Every pass between two GEMMs is one kernel (two where it makes a tensor with one scale, whose amax
has to be known before its cast), reads its inputs once and writes its outputs once, in BF16 or the
GEMM's format. Elements of a rank, for T tokens over t tensor-parallel ranks:

    x    T h / t    hidden states between layers (T h without sequence parallelism)
    s    T h        what a row-parallel layer adds up, and a column-parallel one gathers
    a    T q / t    output of attention; q, k: widths of the query and the key projection
    u    T (q + 2k) / t
    f    T ffn / t  output of the activation, g f its input (g = 2 if gated, else 1)
    P               matrix parameters of the layer on the rank

    pass                          BF16            FP8, one scale per tensor: besides
    residual and norm, twice      16 x            4 x    read the sum again for its cast
    rope, forward                 4 (u - T k/t)   6 a    amax and cast of attention's output
    activation                    2 (g + 1) f     2 g f  twice
    activation, backward          2 (2g + 1) f    2 (g + 1) f
    rope and split, backward      4 u             2 u    twice
    norm, backward, twice         16 x            8 x    cast of the gradient that it adds to
    t > 1: four sums              8 (s + x)       16 s   amax, cast and sum of t messages
           transposed copies      0               8 s - 4 x, with sequence parallelism

    accumulate    (2 + b) n + b per parameter: b bytes of the gradient's format, n = 2 passes if it
                  has one scale per tensor, else 1
    weights       per parameter: 2 for the transposed copy of an FP8 weight, unless cached for the
                  step as the casts of other weights always are
"""

from __future__ import annotations

from fp8lm.config import Config
from fp8lm.numerics import format_by_name, granularity_of


def ideal_bytes(config: Config) -> float:
    """Bytes of one layer and micro-batch, on one rank, outside of GEMMs and attention."""
    model, parallel, precision = config.model, config.parallel, config.precision
    ranks = parallel.tensor_model_parallel_size
    tokens = config.train.micro_batch_size * model.seq_length
    s = tokens * model.hidden_size
    x = s / ranks if parallel.sequence_parallel else s
    q, k = model.query_projection_size, model.kv_projection_size
    a, u = tokens * q / ranks, tokens * (q + 2 * k) / ranks
    f, g = tokens * model.ffn_hidden_size / ranks, 2 if model.swiglu else 1
    moved = 16 * x + 4 * (a + tokens * k / ranks) + 2 * (g + 1) * f
    moved += 2 * (2 * g + 1) * f + 4 * u + 16 * x
    if ranks > 1:
        moved += 8 * (s + x)
    if precision.gemm == "fp8":
        moved += 4 * x + 6 * a + 2 * g * f + 2 * (g + 1) * f + 2 * u + 8 * x
        if ranks > 1 and precision.wire.reduce == "fp8":
            moved += 16 * s
        if ranks > 1 and parallel.sequence_parallel:
            moved += 8 * s - 4 * x
    return moved + matrix_parameters(config) * _per_parameter(config)


def matrix_parameters(config: Config) -> float:
    """Parameters of the matrices of one layer on one rank."""
    return config.model.layer_matrix_parameters / config.parallel.tensor_model_parallel_size


def _per_parameter(config: Config) -> float:
    precision, shape = config.precision, (config.model.hidden_size, config.model.hidden_size)
    gradient, weight = (
        format_by_name(name) for name in (precision.main_grads_dtype, precision.params_dtype)
    )
    one_scale = gradient.scaled and granularity_of(gradient, shape).is_per_tensor
    moved = (2 + gradient.bytes) * (2 if one_scale else 1) + gradient.bytes
    if precision.gemm == "fp8" and weight.bytes == 1 and not precision.cache_weight_operands:
        moved += 2
    return moved
