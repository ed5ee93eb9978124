"""Combinations of keys that are each valid but impossible together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8lm.config.root import Config

FP8_GEMM_MULTIPLE = 16  # cuBLASLt: every dimension of an FP8 GEMM
_TP = "parallel.tensor_model_parallel_size"
_PP = "parallel.pipeline_model_parallel_size"


def find_problems(config: Config) -> list[str]:
    """List every impossible combination: which keys, their values, what would be valid."""
    checks = (
        _heads,
        _positions,
        _batches,
        _rampup,
        _length,
        _learning_rate,
        _schedule,
        _wsd,
        _data,
        _tokenizer,
        _checkpoint,
        _formats,
        _fp8_gemms,
        _tensor_parallel,
        _params_wire,
        _grad_reduce,
        _pipeline,
    )
    return [problem for check in checks for problem in check(config)]


def _heads(config: Config) -> Iterator[str]:
    model = config.model
    heads = f"model.num_attention_heads = {model.num_attention_heads}"
    rounded = max(1, model.hidden_size // model.num_attention_heads)
    if model.hidden_size % model.num_attention_heads and model.kv_channels == rounded:
        yield f"model.hidden_size = {model.hidden_size} is not divisible by {heads}"
    if model.num_attention_heads % model.num_query_groups:
        yield f"{heads} is not divisible by model.num_query_groups = {model.num_query_groups}"


def _positions(config: Config) -> Iterator[str]:
    model = config.model
    if model.seq_length > model.max_position_embeddings:
        yield (
            f"model.seq_length = {model.seq_length} is longer than "
            f"model.max_position_embeddings = {model.max_position_embeddings}"
        )
    rotated = int(model.kv_channels * model.rotary_percent)
    if model.position_embedding_type == "rope" and (rotated % 2 or not rotated):
        yield (
            f"RoPE rotates pairs of channels, but model.kv_channels = {model.kv_channels} with "
            f"model.rotary_percent = {model.rotary_percent:g} gives {rotated}: it must be even"
        )


def _batches(config: Config) -> Iterator[str]:
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size = {train.global_batch_size} is not divisible by "
            f"train.micro_batch_size = {train.micro_batch_size}"
        )


def _rampup(config: Config) -> Iterator[str]:
    train = config.train
    if train.rampup_batch_size is None:
        return
    start, increment, _ = train.rampup_batch_size
    name = f"train.rampup_batch_size = {list(train.rampup_batch_size)}"
    if train.train_samples is None:
        yield f"{name} needs a run measured in train.train_samples, not train.train_iters"
    if start >= train.global_batch_size or (train.global_batch_size - start) % increment:
        yield (
            f"{name} does not reach train.global_batch_size = {train.global_batch_size} "
            f"from {start} in steps of {increment}"
        )
    if start % train.micro_batch_size or increment % train.micro_batch_size:
        yield (
            f"{name}: start and increment must be multiples of "
            f"train.micro_batch_size = {train.micro_batch_size}"
        )


def _length(config: Config) -> Iterator[str]:
    train = config.train
    if (train.train_iters is None) == (train.train_samples is None):
        given = "neither is" if train.train_iters is None else "both are"
        yield f"give exactly one of train.train_iters and train.train_samples: {given} set"
    if train.train_samples is not None and train.train_samples < train.global_batch_size:
        yield (
            f"train.train_samples = {train.train_samples} is less than one batch of "
            f"train.global_batch_size = {train.global_batch_size}"
        )


def _learning_rate(config: Config) -> Iterator[str]:
    lr = config.optimizer.lr
    for name, value in (
        ("optimizer.min_lr", config.optimizer.min_lr),
        ("scheduler.lr_warmup_init", config.scheduler.lr_warmup_init),
    ):
        if value > lr:
            yield f"{name} = {value:g} is greater than optimizer.lr = {lr:g}"


def _schedule(config: Config) -> Iterator[str]:
    train, scheduler = config.train, config.scheduler
    if (train.train_iters is None) == (train.train_samples is None):
        return
    unit, other = _units(config)
    for kind in ("decay", "warmup", "wsd_decay"):
        if length := getattr(scheduler, f"lr_{kind}_{other}"):
            yield (
                f"scheduler.lr_{kind}_{other} = {length} does not fit a run measured in "
                f"train.train_{unit}: use scheduler.lr_{kind}_{unit}"
            )
    warmup = getattr(scheduler, f"lr_warmup_{unit}")
    if scheduler.lr_warmup_fraction is not None and warmup:
        yield (
            f"give scheduler.lr_warmup_fraction = {scheduler.lr_warmup_fraction:g} or "
            f"scheduler.lr_warmup_{unit} = {warmup}, not both"
        )
    if warmup >= _decay_length(config):
        yield (
            f"scheduler.lr_warmup_{unit} = {warmup} must be less than the decay's "
            f"{_decay_length(config)} (scheduler.lr_decay_{unit}, else train.train_{unit})"
        )


def _wsd(config: Config) -> Iterator[str]:
    train, scheduler = config.train, config.scheduler
    unit, _ = _units(config)
    name = f"scheduler.lr_wsd_decay_{unit}"
    length = getattr(scheduler, f"lr_wsd_decay_{unit}")
    if scheduler.lr_decay_style != "WSD":
        if length is not None:
            style = scheduler.lr_decay_style
            yield f"{name} = {length} needs scheduler.lr_decay_style = WSD, not {style}"
    elif length is None:
        yield f"scheduler.lr_decay_style = WSD needs {name}, the length of its final decay"
    elif getattr(train, f"train_{unit}") is not None:
        decay = _decay_length(config)
        if length + getattr(scheduler, f"lr_warmup_{unit}") > decay:
            yield f"{name} = {length} and the warm-up are longer than the schedule's {decay}"


def _units(config: Config) -> tuple[str, str]:
    by_samples = config.train.train_samples is not None
    return ("samples", "iters") if by_samples else ("iters", "samples")


def _decay_length(config: Config) -> int:
    unit, _ = _units(config)
    decay = getattr(config.scheduler, f"lr_decay_{unit}")
    return decay or getattr(config.train, f"train_{unit}")


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.mock_data and data.data_path:
        yield f"data.mock_data = true reads no files: drop data.data_path = {list(data.data_path)}"
    if not data.mock_data and not data.data_path:
        yield "no data: set data.data_path=[PREFIX] or data.mock_data=true"
    if data.data_path and not _is_blend(data.data_path):
        yield (
            f"data.data_path = {list(data.data_path)}: expected [prefix] or "
            "[weight1, prefix1, weight2, prefix2, ...]"
        )
    if not _is_split(data.split):
        yield (
            f'data.split = "{data.split}": expected up to three shares for training, validation '
            'and test, none negative and the first positive, as in "99,1,0"'
        )


def _is_blend(data_path: tuple[float | str, ...]) -> bool:
    if len(data_path) == 1:
        return isinstance(data_path[0], str)
    weights, prefixes = data_path[0::2], data_path[1::2]
    return (
        len(weights) == len(prefixes)
        and not any(isinstance(weight, str) for weight in weights)
        and all(isinstance(prefix, str) for prefix in prefixes)
    )


def _is_split(split: str) -> bool:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        return False
    # Comparisons with NaN are false, so it fails here like a negative share.
    in_range = all(0 <= share < float("inf") for share in shares)
    return len(shares) <= 3 and in_range and shares[0] > 0


def _tokenizer(config: Config) -> Iterator[str]:
    tokenizer = config.tokenizer
    kind = f"tokenizer.tokenizer_type = {tokenizer.tokenizer_type}"
    if tokenizer.tokenizer_type == "NullTokenizer":
        if tokenizer.vocab_size is None:
            yield f"{kind} needs tokenizer.vocab_size"
        if tokenizer.tokenizer_model is not None:
            yield f"{kind} has no tokenizer.tokenizer_model: drop {tokenizer.tokenizer_model}"
        return
    if tokenizer.tokenizer_model is None:
        yield f"{kind} needs tokenizer.tokenizer_model, its file or folder"
    if tokenizer.vocab_size is not None:
        yield f"{kind} knows its size: drop tokenizer.vocab_size = {tokenizer.vocab_size}"


def _checkpoint(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.save_interval is not None and checkpoint.save is None:
        yield (
            f"checkpoint.save_interval = {checkpoint.save_interval} needs checkpoint.save, "
            "the folder to save to"
        )
    train, threshold = config.train, config.train.loss_spike_threshold
    if threshold is None:
        return
    if checkpoint.save is None or checkpoint.save_interval is None:
        yield (
            f"train.loss_spike_threshold = {threshold} needs checkpoint.save and "
            "checkpoint.save_interval: a run rolls back to a checkpoint"
        )
    kept = checkpoint.keep_last or (1 if checkpoint.save_retain_interval else None)
    if kept == 1:
        yield (
            f"train.loss_spike_threshold = {threshold} needs checkpoint.keep_last of 2 or more: "
            f"the last one may be of the {train.loss_spike_patience} steps of the spike"
        )


def _formats(config: Config) -> Iterator[str]:
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


def _params_wire(config: Config) -> Iterator[str]:
    precision = config.precision
    if precision.wire.params == "fp8" and precision.params_dtype != "fp8_e4m3":
        yield (
            f"precision.wire.params = fp8 needs precision.params_dtype = fp8_e4m3, not "
            f"{precision.params_dtype}: other weights travel as they are stored "
            "(precision.wire.params = bf16)"
        )


def _pipeline(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    size = f"{_PP} = {parallel.pipeline_model_parallel_size}"
    virtual = parallel.num_layers_per_virtual_pipeline_stage
    first, last = (
        parallel.decoder_first_pipeline_num_layers,
        parallel.decoder_last_pipeline_num_layers,
    )
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        for name, value in (
            ("num_layers_per_virtual_pipeline_stage", virtual),
            ("decoder_first_pipeline_num_layers", first),
            ("decoder_last_pipeline_num_layers", last),
        ):
            if value is not None:
                yield f"parallel.{name} = {value} needs {_PP} > 1"
        return
    if virtual is not None:
        if layers % (virtual * stages):
            yield (
                f"model.num_layers = {layers} is not divisible by {size} times "
                f"parallel.num_layers_per_virtual_pipeline_stage = {virtual}"
            )
        if first is not None or last is not None or parallel.pipeline_schedule != "1f1b":
            yield (
                "parallel.num_layers_per_virtual_pipeline_stage has a schedule of its own with "
                "equal stages: drop parallel.decoder_first_pipeline_num_layers, "
                "parallel.decoder_last_pipeline_num_layers and parallel.pipeline_schedule"
            )
        return
    left = layers - (first or 0) - (last or 0)
    shared = stages - (first is not None) - (last is not None)
    if left < shared or (left % shared if shared else left):
        yield (
            f"model.num_layers = {layers}: the {left} layers of the {shared} pipeline stages "
            f"without a number of their own do not divide evenly ({size}): set "
            "parallel.decoder_first_pipeline_num_layers or "
            "parallel.decoder_last_pipeline_num_layers"
        )


def _grad_reduce(config: Config) -> Iterator[str]:
    precision = config.precision
    if precision.grad_reduce == "fp32_accumulate":
        return
    name = f"precision.grad_reduce = {precision.grad_reduce}"
    if precision.main_grads_dtype != "fp8_e4m3":
        yield (
            f"{name} adds FP8 gradients, but precision.main_grads_dtype = "
            f"{precision.main_grads_dtype}: use fp8_e4m3, or fp32_accumulate"
        )


def _fp8_gemms(config: Config) -> Iterator[str]:
    if config.precision.gemm != "fp8":
        return
    model, train = config.model, config.train
    queries, kv = model.query_projection_size, model.kv_projection_size
    whole = {
        "model.hidden_size": model.hidden_size,
        "model.seq_length * train.micro_batch_size": model.seq_length * train.micro_batch_size,
    }
    split = {
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.num_attention_heads * model.kv_channels": queries,
        "the width of queries, keys and values (model.num_query_groups, model.kv_channels)": queries
        + 2 * kv,
    }
    ranks = config.parallel.tensor_model_parallel_size
    for dimensions, parts in ((whole, 1), (split, ranks)):
        for name, size in dimensions.items():
            # A size that does not divide at all is told by another check.
            if size % parts == 0 and size // parts % FP8_GEMM_MULTIPLE:
                of_rank = f" / {_TP} = {ranks} is {size // parts}, " if parts > 1 else " is "
                yield (
                    f"{name} = {size}{of_rank}not a multiple of {FP8_GEMM_MULTIPLE}, which FP8 "
                    "GEMMs need (precision.gemm = fp8)"
                )


def _tensor_parallel(config: Config) -> Iterator[str]:
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    if ranks == 1:
        if config.parallel.sequence_parallel:
            yield (
                f"parallel.sequence_parallel = true needs {_TP} > 1: one rank has the whole "
                "sequence"
            )
        return
    divided = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    if config.parallel.sequence_parallel:
        divided["model.seq_length"] = model.seq_length
    for name, size in divided.items():
        if size % ranks:
            yield f"{name} = {size} is not divisible by {_TP} = {ranks}"
