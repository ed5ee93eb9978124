"""Checks of combinations of formats, and of sizes for FP8 GEMMs."""

from __future__ import annotations

from collections.abc import Iterator

from fp8lm.config.checks.parallel import QKV_WIDTH, TENSOR_PARALLEL
from fp8lm.config.root import Config

FP8_GEMM_MULTIPLE = 16  # cuBLASLt: every dimension of an FP8 GEMM
_BLOCKS = {"block_1x128": 128, "block_128x128": 128, "mx_1x32": 32}  # their longer side


def formats(config: Config) -> Iterator[str]:
    """FP8 weights enter FP8 GEMMs; only scaled FP16 is its own master."""
    precision = config.precision
    if precision.params_dtype == "fp8_e4m3" and precision.gemm != "fp8":
        yield (
            "precision.params_dtype = fp8_e4m3 needs precision.gemm = fp8, "
            f"not {precision.gemm}: FP8 weights only enter FP8 GEMMs"
        )
    if precision.main_params_dtype == "none" and precision.params_dtype != "fp16":
        yield (
            f"precision.params_dtype = {precision.params_dtype} needs a master weight: "
            "precision.main_params_dtype = none is for params_dtype = fp16"
        )


def params_wire(config: Config) -> Iterator[str]:
    """Only FP8 weights are sent in FP8."""
    precision = config.precision
    if precision.wire.params == "fp8" and precision.params_dtype != "fp8_e4m3":
        yield (
            f"precision.wire.params = fp8 needs precision.params_dtype = fp8_e4m3, not "
            f"{precision.params_dtype}: other weights travel as they are stored "
            "(precision.wire.params = bf16)"
        )


def grad_reduce(config: Config) -> Iterator[str]:
    """Only FP8 gradients are added up in FP8, and only sums in fp32 take two hops."""
    precision = config.precision
    if precision.grad_reduce == "fp32_accumulate":
        return
    name = f"precision.grad_reduce = {precision.grad_reduce}"
    if precision.main_grads_dtype != "fp8_e4m3":
        yield (
            f"{name} adds gradients in E4M3, but precision.main_grads_dtype = "
            f"{precision.main_grads_dtype}: use fp8_e4m3, or fp32_accumulate"
        )
    if config.parallel.node_size is not None:
        yield (
            f"parallel.node_size = {config.parallel.node_size} is for precision.grad_reduce = "
            f"fp32_accumulate, which alone sums on machines first, not {precision.grad_reduce}"
        )


def block_scales(config: Config) -> Iterator[str]:
    """Rows of gradients in E2M5 divide into blocks that are worth the four bytes of a scale."""
    precision = config.precision
    if precision.main_grads_dtype != "fp8_e2m5" or precision.gemm == "fp8":
        return  # FP8 GEMMs need the same
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    rows = {
        "model.hidden_size": (model.hidden_size, 1),
        "model.ffn_hidden_size": (model.ffn_hidden_size, ranks),
        "model.num_attention_heads * model.kv_channels": (model.query_projection_size, ranks),
    }
    for name, (size, parts) in rows.items():
        if odd := _not_a_multiple(name, size, parts):
            yield (
                f"{odd}, which blocks of gradients need (precision.main_grads_dtype = fp8_e2m5): "
                "use bf16"
            )


def scaling(config: Config) -> Iterator[str]:
    """A weight stored in FP8 has one scale; tensor parallelism cuts no block."""
    precision = config.precision
    if precision.gemm != "fp8":
        if precision.smooth_swiglu:
            yield f"precision.smooth_swiglu = true is for FP8: precision.gemm = {precision.gemm}"
        return
    weight = precision.scaling.weight
    if precision.params_dtype == "fp8_e4m3" and weight != "tensor":
        yield (
            f"precision.scaling.weight = {weight} is for a weight that is cast for its GEMMs, but "
            "precision.params_dtype = fp8_e4m3 stores it with one scale: use tensor, or "
            "params_dtype = bf16"
        )
    if precision.smooth_swiglu and not config.model.swiglu:
        yield "precision.smooth_swiglu = true needs model.swiglu = true, whose output it scales"
    granularities = precision.scaling.by_kind()
    if precision.scaling_method != "current" and set(granularities.values()) != {"tensor"}:
        kind = next(kind for kind, name in granularities.items() if name != "tensor")
        yield (
            f"precision.scaling_method = {precision.scaling_method} has one scale per tensor, but "
            f"precision.scaling.{kind} = {granularities[kind]}: use tensor, or current"
        )
    ranks = config.parallel.tensor_model_parallel_size
    if ranks > 1:
        blocks = {k: _BLOCKS.get(name, 1) for k, name in granularities.items()}
        for name, size, kinds in _cut(config):
            kind = max(kinds, key=lambda kind: blocks[kind])
            if size % ranks == 0 and size // ranks % blocks[kind]:
                yield (
                    f"{name} = {size} / {TENSOR_PARALLEL} = {ranks} is {size // ranks}, which cuts "
                    f"blocks of {blocks[kind]} (precision.scaling.{kind}): use a multiple of "
                    f"{ranks * blocks[kind]}"
                )


def _cut(config: Config) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Dimensions of FP8 operands of which tensor-parallel ranks hold parts, and of which kinds."""
    sent = ("input", "grad_output")
    every = (*sent, "weight")
    for name, size, parts in _weight_dimensions(config):
        if parts > 1:
            yield name, size, every
    if config.parallel.sequence_parallel and config.precision.wire.gather == "fp8":
        name, size, _ = _tokens(config)
        yield name, size, sent


def fp8_gemms(config: Config) -> Iterator[str]:
    """Every dimension of an FP8 GEMM, on every rank, is what cuBLASLt takes."""
    if config.precision.gemm != "fp8":
        return
    for name, size, parts in (*_weight_dimensions(config), _tokens(config)):
        if odd := _not_a_multiple(name, size, parts):
            yield f"{odd}, which FP8 GEMMs need (precision.gemm = fp8)"


def blocks_on_gpu(config: Config, *, trains: bool) -> Iterator[str]:
    """On a GPU blocks of 128 are whole, too; a model that is not trained contracts no tokens."""
    scaling = config.precision.scaling.by_kind()
    kind = next((kind for kind, name in scaling.items() if _BLOCKS.get(name) == 128), None)
    if config.precision.gemm != "fp8" or kind is None:
        return
    contracted = (*_weight_dimensions(config), *((_tokens(config),) if trains else ()))
    for name, size, parts in contracted:
        if odd := _not_a_multiple(name, size, parts, 128):
            yield (
                f"{odd}, which blocks of 128 need on a GPU (precision.scaling.{kind} = "
                f"{scaling[kind]}): use another preset, or train.device=cpu"
            )


def _weight_dimensions(config: Config) -> Iterator[tuple[str, int, int]]:
    """Of linear layers, by name, and the number of ranks that cut each."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    queries, kv = model.query_projection_size, model.kv_projection_size
    yield "model.hidden_size", model.hidden_size, 1
    yield "model.ffn_hidden_size", model.ffn_hidden_size, ranks
    yield "model.num_attention_heads * model.kv_channels", queries, ranks
    yield QKV_WIDTH, queries + 2 * kv, ranks


def _tokens(config: Config) -> tuple[str, int, int]:
    """Of a micro-batch, as `_weight_dimensions`."""
    tokens = config.model.seq_length * config.train.micro_batch_size
    return "model.seq_length * train.micro_batch_size", tokens, 1


def _not_a_multiple(
    name: str, size: int, parts: int, multiple: int = FP8_GEMM_MULTIPLE
) -> str | None:
    """That a rank's part of `size` is no `multiple`; sizes that do not divide are not for here."""
    if size % parts or size // parts % multiple == 0:
        return None
    of_rank = f" / {TENSOR_PARALLEL} = {parts} is {size // parts}, " if parts > 1 else " is "
    return f"{name} = {size}{of_rank}not a multiple of {multiple}"
