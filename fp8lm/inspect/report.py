"""The layout of a job in words: who holds what, the arithmetic of the batch, bytes of state."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from fp8lm.config import Config, PrecisionConfig
from fp8lm.inspect.layout import KINDS, JobLayout, RankLayout, job_layout
from fp8lm.optim.schedule import BatchSize
from fp8lm.parallel.schedule import simulate
from fp8lm.parallel.stages import schedule_maker

GB = 1e9
BILLION = 1e9
MOST_LINES = 40
_COLUMNS = ("weights", "grads", "master", "m", "v")


def describe_job(
    config: Config, num_ids: int, world_size: int, node_size: int, *, all_ranks: bool = False
) -> Iterator[str]:
    """Lines about `world_size` processes, `node_size` on each machine.

    Ranks that are alike share a line; `all_ranks` gives each its own.
    """
    job = job_layout(config, num_ids, world_size, node_size)
    yield f"job       {describe_processes(config, job, node_size)}"
    yield f"model     {describe_model(config, job)}"
    yield from (f"{line}" for line in describe_work(config, job))
    yield f"state     {describe_state(config, job, num_ids, node_size)}"
    yield ""
    yield from layout_table(job, config, all_ranks)


def describe_processes(config: Config, job: JobLayout, node_size: int) -> str:
    """How the processes are divided."""
    parallel, count = config.parallel, len(job.ranks)
    machines = job.ranks[-1].node + 1
    notes = [f"TP{job.tensor_size} PP{job.stages} DP{job.replicas}"]
    if parallel.sequence_parallel:
        notes.append("sequence parallel")
    if job.replicas > 1 and parallel.use_distributed_optimizer:
        what = {"tensor": "whole tensors", "even": "even row blocks"}[parallel.partition]
        notes.append(f"ZeRO over {what}")
    on = f"{machines} machine{'s' * (machines > 1)} of {node_size}"
    return f"{count} process{'es' * (count > 1)} on {on}: {', '.join(notes)}"


def describe_model(config: Config, job: JobLayout) -> str:
    """Size and precision."""
    layers, wire = config.model.num_layers, config.precision.wire
    wires = {"gather": wire.gather, "reduce": wire.reduce, "pipeline": wire.pipeline}
    wires |= {"grads": wire.grads, "params": wire.params}
    kinds = sorted(set(wires.values()))
    travels = kinds[0] if len(kinds) == 1 else ", ".join(f"{k} {v}" for k, v in wires.items())
    return (
        f"{job.parameters / BILLION:.3f} B parameters in {layers} layers, preset "
        f"{config.precision.preset}; on the wires: {travels}"
    )


def describe_work(config: Config, job: JobLayout) -> Iterator[str]:
    """Batch, length of the run, pipeline."""
    train, sequence = config.train, config.model.seq_length
    micro = train.global_batch_size // (train.micro_batch_size * job.replicas)
    tokens = train.global_batch_size * sequence
    yield (
        f"batch     {train.micro_batch_size} sample{'s' * (train.micro_batch_size > 1)} x {micro} "
        f"micro-batch{'es' * (micro > 1)} x {job.replicas} replica{'s' * (job.replicas > 1)} = "
        f"{train.global_batch_size} samples, {tokens:,} tokens a step"
    )
    steps, samples = run_length(config, job.replicas)
    yield f"run       {steps:,} steps, {samples * sequence / BILLION:.3f} B tokens"
    if job.stages > 1:
        parallel = config.parallel
        chunks = parallel.num_chunks(config.model.num_layers)
        schedule = schedule_maker(parallel.pipeline_schedule, job.stages, chunks)(micro)
        name = "interleaved" if chunks > 1 else parallel.pipeline_schedule
        bubble = simulate(schedule, micro).bubble
        yield (
            f"pipeline  {name}: stages wait for {100 * bubble:.1f} % of a step, and hold up to "
            f"{max(schedule.in_flight)} micro-batches"
        )


def run_length(config: Config, replicas: int) -> tuple[int, int]:
    """Steps and samples of the whole run; a ramp-up is gone through."""
    train = config.train
    if train.train_iters is not None:
        return train.train_iters, train.train_iters * train.global_batch_size
    batch_size, steps, samples = BatchSize(train, replicas), 0, 0
    while samples < train.train_samples:
        samples += batch_size.global_batch_size(samples)
        steps += 1
    return steps, samples


def describe_state(config: Config, job: JobLayout, num_ids: int, node_size: int) -> str:
    """Bytes of state per rank, beside what the BF16 stack would hold."""
    text = f"{_range(job)} GB per rank"
    if config.precision.preset == "bf16":
        return text
    other = config.model_copy(update={"precision": PrecisionConfig(preset="bf16")})
    whole = job_layout(other, num_ids, len(job.ranks), node_size)
    return f"{text}; in preset bf16 it would be {_range(whole)} GB"


def layout_table(job: JobLayout, config: Config, all_ranks: bool) -> Iterator[str]:
    """A line for each rank, for ranks alike, or for each stage, whichever is short enough."""
    groups = [[rank] for rank in job.ranks] if all_ranks else _alike(job.ranks)
    if len(groups) > MOST_LINES and not all_ranks:
        groups = [[r for r in job.ranks if r.stage == stage] for stage in range(job.stages)]
    yield (
        f"{'ranks':>11} {'machines':>9} {'replica':>8} {'stage':>6}  {'layers':15} {'also holds':16}"
        + "".join(f"{column:>9}" for column in _COLUMNS)
        + f"{'GB':>9}"
    )
    for ranks in groups:
        yield _table_row(ranks, config)


def _table_row(ranks: Sequence[RankLayout], config: Config) -> str:
    first, last = ranks[0], ranks[-1]
    tied = not config.model.untie_embeddings_and_output_weights
    ends = ["embedding"] * first.parts[0].has_embedding
    if first.parts[-1].has_head:
        ends.append("head" if not tied or first.parts[0].has_embedding else "tied head")
    layers = " ".join(_span(part.layers[0], part.layers[-1]) for part in first.parts)
    held = [[rank.state_bytes[kind] for rank in ranks] for kind in KINDS]
    cells = [statistics.mean(kind) / GB for kind in held]
    return (
        f"{_span(first.rank, last.rank):>11} {_span(first.node, last.node):>9} "
        f"{_span(first.replica, last.replica):>8} {first.stage:>6}  {layers:15} "
        f"{', '.join(ends):16}" + "".join(f"{cell:9.3f}" for cell in [*cells, sum(cells)])
    )


def _alike(ranks: Sequence[RankLayout]) -> list[list[RankLayout]]:
    """Runs of ranks with the same part of the model and the same bytes."""
    groups: list[list[RankLayout]] = []
    for rank in ranks:
        same = groups and (rank.stage, rank.state_bytes) == (
            groups[-1][-1].stage,
            groups[-1][-1].state_bytes,
        )
        if same:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return groups


def _range(job: JobLayout) -> str:
    low, high = min(r.total_bytes for r in job.ranks), max(r.total_bytes for r in job.ranks)
    if low == high:
        return f"{low / GB:.3f}"
    mean = statistics.mean(rank.total_bytes for rank in job.ranks)
    return f"{low / GB:.3f} to {high / GB:.3f} (mean {mean / GB:.3f})"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
