"""Checks of batches and run length."""

from __future__ import annotations

from collections.abc import Iterator

from fp8lm.config.root import Config


def batches(config: Config) -> Iterator[str]:
    """Micro-batches divide the global batch."""
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size = {train.global_batch_size} is not divisible by "
            f"train.micro_batch_size = {train.micro_batch_size}"
        )


LARGEST_SEED = 2**32 - 1  # of numpy's RandomState, with which megatron-core shuffles files


def seed(config: Config) -> Iterator[str]:
    """Files are shuffled by a seed that numpy takes."""
    key = "train.seed" if config.data.shuffle_seed is None else "data.shuffle_seed"
    if config.data.data_path and config.shuffle_seed > LARGEST_SEED:
        yield (
            f"{key} = {config.shuffle_seed} is too large to shuffle data.data_path: the largest "
            f"is {LARGEST_SEED}"
        )


def rampup(config: Config) -> Iterator[str]:
    """A ramp-up reaches the global batch in whole micro-batches."""
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


def tasks(config: Config) -> Iterator[str]:
    """What says how tasks are evaluated needs some."""
    for key in ("limit", "num_fewshot", "folder", "data"):
        value = getattr(config.train, f"eval_tasks_{key}")
        if value is not None and not config.train.eval_tasks:
            yield (
                f"train.eval_tasks_{key} = {value} is for tasks, and there are none: name them in "
                "train.eval_tasks, or leave it out"
            )


def cuda_graphs(config: Config) -> Iterator[str]:
    """A captured micro-batch is the same every time, and the whole of one stage's work."""
    train, model, parallel = config.train, config.model, config.parallel
    if not train.enable_cuda_graph:
        return
    key, off = "train.enable_cuda_graph = true", "or train.enable_cuda_graph=false"
    if train.device == "cpu":
        yield f"{key} needs a GPU, and train.device = cpu: set train.device=cuda, {off}"
    if (stages := parallel.pipeline_model_parallel_size) > 1:
        yield (
            f"{key} captures whole micro-batches, and with parallel.pipeline_model_parallel_size = "
            f"{stages} a stage sends and receives within them: set "
            f"parallel.pipeline_model_parallel_size=1, {off}"
        )
    if parallel.overlap_param_gather:
        yield (
            f"{key} replays the first micro-batch as a whole, and parallel.overlap_param_gather = "
            f"true waits for weights in between: set parallel.overlap_param_gather=false, {off}"
        )
    if model.attention_dropout:
        yield (
            f"{key} replays what attention dropout would draw from a generator: set "
            f"model.attention_dropout=0 instead of {model.attention_dropout:g}, {off}"
        )
    if config.separates_documents:
        kept = "data.reset_attention_mask" if config.data.reset_attention_mask else "tuning.packing"
        if train.objective == "dpo":
            kept = "train.objective = dpo"
        yield (
            f"{key} replays micro-batches of one shape, and with {kept} documents of other lengths "
            f"are kept apart in each: set train.enable_cuda_graph=false"
        )


def length(config: Config) -> Iterator[str]:
    """A run has one length, of one batch at least."""
    train = config.train
    if (train.train_iters is None) == (train.train_samples is None):
        given = "neither is" if train.train_iters is None else "both are"
        yield f"give exactly one of train.train_iters and train.train_samples: {given} set"
    if train.train_samples is not None and train.train_samples < train.global_batch_size:
        yield (
            f"train.train_samples = {train.train_samples} is less than one batch of "
            f"train.global_batch_size = {train.global_batch_size}"
        )
