"""A layout and its steps as text: a summary, a line per stage, a line per rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fp8lm.config import Config
from fp8lm.planner.batches import Batches
from fp8lm.planner.layout import KINDS, Layout, RankPlacement, Stage

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def summary(layout: Layout, batches: Batches, compared: Sequence[Layout] = ()) -> list[str]:
    """Lines with processes, batch, run and bytes of state per rank.

    `compared` are layouts of the same processes in other presets, whose bytes stand below.
    """
    config, ranks = layout.config, len(layout.ranks)
    of_nodes = f" on {layout.num_nodes} nodes" if layout.num_nodes > 1 else ""
    batch = (
        f"batch: {count(batches.global_batch_size, 'sample')} = "
        f"{count(batches.num_replicas, 'replica')} x "
        f"{count(batches.num_microbatches, 'micro-batch')} of {batches.micro_batch_size}, "
        f"{short(batches.tokens_per_step)} tokens"
    )
    run = f"run: {count(batches.iterations, 'step')}, {short(batches.tokens)} tokens"
    if batches.bubble:
        run += f"; a stage is idle {batches.bubble:.1%} of the time"
    return [
        f"{count(ranks, 'process')}{of_nodes}: {_division(config, layout)}",
        batch,
        run,
        f"parameters: {short(layout.num_parameters)}",
        *(_state_line(each) for each in (layout, *compared)),
    ]


def _division(config: Config, layout: Layout) -> str:
    parallel, dims = config.parallel, layout.dims
    tensor = f"TP {dims.tp}"
    tensor += " with SP" * parallel.sequence_parallel
    stages = f"PP {dims.pp}"
    if dims.pp > 1:
        chunks = len(layout.stages[0].chunks)
        kind = f"interleaved, {chunks} chunks" if chunks > 1 else parallel.pipeline_schedule
        stages += f" ({kind})"
    replicas = f"DP {dims.dp}"
    if dims.dp > 1:
        zero = f"ZeRO, {parallel.partition}" if parallel.use_distributed_optimizer else "plain"
        replicas += f" ({zero})"
    return f"{tensor}, {stages}, {replicas}"


def _state_line(layout: Layout) -> str:
    totals, preset = layout.totals, layout.config.precision.preset
    mean = {kind: _mean(layout.state(place)[kind] for place in layout.ranks) for kind in KINDS}
    kinds = ", ".join(f"{kind} {size(value)}" for kind, value in mean.items() if value)
    usual, most = size(_mean(totals)), size(max(totals))
    most = f", at most {most}" if most != usual else ""
    return f"state per process, {preset}: {usual}{most} ({kinds})"


def stage_table(layout: Layout) -> list[str]:
    """A line per pipeline stage, whose ranks hold parts of the same shapes."""
    rows: list[tuple[str, ...]] = [
        ("stage", "ranks", "nodes", "layers", "besides", "state: least", "mean", "most")
    ]
    for number, stage in enumerate(layout.stages):
        here = [place for place in layout.ranks if place.stage == number]
        totals = stage.totals
        rows.append(
            (
                str(number),
                ranges(place.rank for place in here),
                ranges(place.node for place in here),
                layers(stage),
                ends(layout, number),
                *(size(value) for value in (min(totals), _mean(totals), max(totals))),
            )
        )
    return aligned(rows, left={3, 4})


def rank_table(layout: Layout) -> list[str]:
    """A line per rank: where it runs, what it holds, its bytes by kind."""
    rare = [kind for kind in ("operands", "reference") if not layout.holds(kind)]
    kinds = [kind for kind in KINDS if kind not in rare]
    head = ("rank", "node", "local", "tensor", "data", "stage", "layers", "besides")
    rows: list[tuple[str, ...]] = [(*head, *kinds, "all")]
    for place in layout.ranks:
        state = layout.state(place)
        rows.append(
            (
                *map(str, _numbers(place)),
                layers(layout.stages[place.stage]),
                ends(layout, place.stage),
                *(size(state[kind]) for kind in kinds),
                size(sum(state.values())),
            )
        )
    return aligned(rows, left={6, 7})


def _numbers(place: RankPlacement) -> tuple[int, ...]:
    return (
        place.rank,
        place.node,
        place.local_rank,
        place.tensor,
        place.data,
        place.stage,
    )


def layers(stage: Stage) -> str:
    """The layers of a stage, a range per chunk."""
    return ", ".join(ranges(part.layers) for part in stage.chunks)


def ends(layout: Layout, number: int) -> str:
    """What a stage holds beside its layers."""
    chunks = layout.stages[number].chunks
    held = []
    if any(part.has_embedding for part in chunks):
        held.append("embeddings")
    if any(part.has_head for part in chunks):
        untied = layout.config.model.untie_embeddings_and_output_weights
        held += ["final norm", "head" if untied else "tied head"]
    return ", ".join(held)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges: 0-3, 8."""
    runs: list[list[int]] = []
    for number in dict.fromkeys(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def aligned(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Columns of equal width, those in `left` left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def short(number: float, units: Sequence[tuple[float, str]] = UNITS) -> str:
    """Three digits and a unit: 1.05 M."""
    for factor, unit in units:
        if number >= factor:
            return f"{_three_digits(number / factor)} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes, in units of powers of ten: 18.3 GB."""
    return short(number, BYTES) if number >= BYTES[-1][0] else f"{number:.0f} B"


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`, `2 processes`, `2 micro-batches`."""
    plural = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number} {noun}{plural * (number != 1)}"


def _three_digits(number: float) -> str:
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f}"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
