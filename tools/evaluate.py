"""Perplexity and zero-shot tasks of trained models, side by side.

python tools/evaluate.py --load runs/x/checkpoints --data data/valid_text_document --json x.json
python tools/evaluate.py --load runs/fp8/checkpoints --load runs/bf16/checkpoints \\
    --data held_out.txt --tasks hellaswag,piqa,arc_easy
torchrun --nproc-per-node 4 tools/evaluate.py --tensor-model-parallel-size 2 --load ... --data ...

Every token is scaled by itself, as in generation: a score does not depend on what is computed with
it. Tasks are lm-eval's (`pip install "fp8lm[eval]"`); without a network their data come from files.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8lm.arguments import as_path, file_to_write, number_type, path_text
from fp8lm.checkpoint.collectives import all_or_error
from fp8lm.data.documents import INPUT_FORMATS
from fp8lm.data.files import write_aside
from fp8lm.evaluation.needle import NeedleReport, find_needles, heat_map
from fp8lm.evaluation.perplexity import Perplexity, check_windows, perplexity, read_corpus
from fp8lm.generate.loading import Job, add_model_arguments, job_of_options
from fp8lm.generate.model import InferenceModel
from fp8lm.pictures import picture_path
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser, InputError
from fp8lm.runtime.output import show

STDERR = "_stderr"
MOST_ANSWER = 16  # tokens, also where each byte is one


@dataclass(frozen=True)
class Report:
    """What was found of the model in folder `name`."""

    name: str
    precision: str
    perplexity: Perplexity | None
    tasks: dict[str, dict[str, Any]]
    needles: NeedleReport | None = None

    def facts(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are null."""
        found = {"load": self.name, "precision": self.precision}
        of_corpus = {} if self.perplexity is None else {"perplexity": self.perplexity.facts()}
        needles = {} if self.needles is None else {"needles": self.needles.facts()}
        return finite_only({**found, **of_corpus, "tasks": self.tasks, **needles})


def main(argv: list[str]) -> None:
    """Evaluate every model, print the table, write the file."""
    options = parse_options(argv)
    with job_of_options(options) as job:
        reports = [evaluate(job, folder, options) for folder in options.load]
        if not job.groups.is_main:
            return
    show(table(reports))
    if options.heat_map is not None:
        draw(reports, options.heat_map)
    if options.json is not None:
        write_aside(options.json, json.dumps(facts(reports), indent=1) + "\n")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, several=True)
    add = parser.add_argument_group("perplexity").add_argument
    add(
        "--data", type=path_text, help="prefix of .bin and .idx files, or a text or JSON lines file"
    )
    add("--window", type=number_type(1), help="most tokens before a token (default: seq_length)")
    add("--stride", type=number_type(1), help="tokens that a window scores (default: all of it)")
    add("--max-tokens", type=number_type(1), help="of the corpus, whole documents")
    add("--input-format", choices=INPUT_FORMATS, default="auto", help="auto: by name and content")
    add("--json-keys", default="text", metavar="KEY", help="of the text in JSON (default: text)")
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", type=names, default=[], help="of lm-eval: hellaswag,piqa,...")
    add("--num-fewshot", type=number_type(0), help="examples before each question (default: 0)")
    add("--limit", type=number_type(1), help="items of a task, the first")
    add("--task-folder", type=as_path, help="YAML files of tasks of your own")
    add("--task-data", type=as_path, help="local data: FOLDER/TASK/SPLIT.jsonl")
    add = parser.add_argument_group("needle in a haystack").add_argument
    add("--needle", type=as_path, metavar="TEXT", help="a text file to hide a sentence in")
    add("--needle-lengths", type=lengths, help="tokens of context (default: 1/8 .. 1 of the most)")
    add("--needle-depths", type=depths, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="in per cent")
    add("--needle-trials", type=number_type(1), default=8, help="sentences (default: 8)")
    add("--heat-map", type=picture_path, metavar="PNG", help="draw recall over length and depth")
    add = parser.add_argument_group("output").add_argument
    add("--batch-size", type=number_type(1), default=16, help="texts at once (default: 16)")
    add("--json", type=file_to_write, help="write all numbers to this file")
    options = parser.parse_args(argv)
    if options.data is None and not options.tasks and options.needle is None:
        parser.error("nothing to evaluate: give --data, --tasks or --needle")
    if options.heat_map is not None and options.needle is None:
        parser.error("--heat-map shows what --needle finds: give a text")
    return options


def names(text: str) -> list[str]:
    """Names between commas, each once."""
    found = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names, such as piqa,boolq")
    return found


def lengths(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [number_type(1)(part.strip()) for part in text.split(",")]


def depths(text: str) -> list[float]:
    """Shares, from numbers of per cent between commas."""
    return [number_type(0, 100)(part.strip()) / 100 for part in text.split(",")]


def evaluate(job: Job, folder: str, options: argparse.Namespace) -> Report:
    """All that is asked for, of one model."""
    with job.model(folder) as model:
        precision = model.config.precision.preset
        corpus = None if options.data is None else of_corpus(model, options)
        tasks = of_tasks(model, options) if options.tasks else {}
        needles = None if options.needle is None else of_needles(model, options)
    return Report(folder, precision, corpus, tasks, needles)


def of_corpus(model: InferenceModel, options: argparse.Namespace) -> Perplexity:
    """The perplexity of `--data`."""
    window = options.window or min(model.config.model.seq_length, model.context_length)
    stride = options.stride or window
    check_windows(window, stride, model.context_length)
    corpus = all_or_error(
        model.groups.world,
        lambda: read_corpus(
            options.data,
            model.tokenizer,
            options.max_tokens,
            input_format=options.input_format,
            key=options.json_keys,
        ),
    )
    return perplexity(model, corpus, window, stride, options.batch_size)


def of_needles(model: InferenceModel, options: argparse.Namespace) -> NeedleReport:
    """Recall of a sentence in `--needle`; by default up to the context without the answer."""
    most = model.context_length - MOST_ANSWER
    wanted = options.needle_lengths or [most * part // 8 for part in (1, 2, 4, 8)]
    return find_needles(
        model,
        options.needle,
        wanted,
        options.needle_depths,
        options.needle_trials,
        options.batch_size,
    )


def draw(reports: list[Report], path: Path) -> None:
    """The heat maps of all models."""
    heads = column_heads(reports)
    shown = {
        head: report.needles for head, report in zip(heads, reports, strict=True) if report.needles
    }
    heat_map(shown, path)


def of_tasks(model: InferenceModel, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The results of `--tasks`."""
    try:
        from fp8lm.evaluation.harness import Tasks, TaskSource  # lm-eval takes seconds to import
    except ModuleNotFoundError as error:
        raise InputError(
            f'--tasks needs lm-eval ({error.name} is missing): pip install "fp8lm[eval]"'
        ) from None
    source = TaskSource(options.tasks, options.task_folder, options.task_data, options.num_fewshot)
    tasks = all_or_error(model.groups.world, lambda: Tasks.load(source))
    return tasks.evaluate(model, batch_size=options.batch_size, limit=options.limit)


def facts(reports: list[Report]) -> dict[str, Any]:
    """All reports, and differences of loss to the first."""
    found: dict[str, Any] = {"models": [report.facts() for report in reports]}
    first, *others = (report.perplexity for report in reports)
    differences = [other.difference(first) for other in others if other and first]
    if differences:
        found["loss_minus_first"] = [
            finite_only({"value": mean.value, "stderr": mean.error}) if mean else None
            for mean in differences
        ]
    return found


def finite_only(value: Any) -> Any:
    """`value` with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: finite_only(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(reports: list[Report]) -> str:
    """A row for each metric, a column for each model; a second number is a standard error."""
    columns = [cells_of(report) for report in reports]
    rows = list(dict.fromkeys(row for column in columns for row in column))
    first = reports[0].perplexity
    lines = [["", *column_heads(reports)]]
    lines += [[row, *(column.get(row, "") for column in columns)] for row in rows]
    if first is not None and len(reports) > 1:
        means = [r.perplexity.difference(first) if r.perplexity else None for r in reports[1:]]
        cells = [number(mean.value, mean.error) if mean else "" for mean in means]
        lines.append(["loss minus the first's", "", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def column_heads(reports: list[Report]) -> list[str]:
    """Folder and preset of every model, the folder's last part where that tells them apart."""
    short = len({Path(report.name).name for report in reports}) == len(reports)
    return [
        f"{Path(report.name).name if short else report.name} ({report.precision})"
        for report in reports
    ]


def cells_of(report: Report) -> dict[str, str]:
    """The cells of a column by row."""
    cells = {}
    if report.perplexity is not None:
        found = report.perplexity.facts()
        for key in ("loss", "perplexity", "bits_per_byte", "word_perplexity"):
            cells[key.replace("_", " ")] = number(found[key], found[key + STDERR])
    if report.needles is not None:
        for depth, recall in zip(report.needles.depths, report.needles.recall, strict=True):
            for length, value in zip(report.needles.lengths, recall, strict=True):
                cells[f"needle at {depth:.0%} of {length}"] = f"{value:.2f}"
    for task, metrics in report.tasks.items():
        for key, value in metrics.items():
            if STDERR not in key and key != "samples":
                name, _, filtered = key.partition(",")
                error = metrics.get(",".join(filter(None, (name + STDERR, filtered))), math.nan)
                cells[f"{task} {key}"] = number(value, error)
    return cells


def number(value: float, error: float) -> str:
    """A value and its standard error, if that is known."""
    return f"{value:.4f}" + (f" +- {error:.4f}" if math.isfinite(error) else "")


if __name__ == "__main__":
    exit_with(main)
