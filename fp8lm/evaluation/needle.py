"""A needle in a haystack: recall of one sentence, by length of the context and depth in it.

    | text ... The number of Oslo is 4817. ... text  The number of Oslo is | 4817.
    0          depth                                                        length

recall   share of trials in which greedy decoding would write the answer, all of its tokens
gain     nats by which the needle makes the answer likelier than the same text without it, which
         shows of a small model how far it looks back before it recalls anything

The text comes from a file. Names and numbers are drawn from a seed, the same for every model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8lm.data.tokenizer import Tokenizer
from fp8lm.evaluation.scoring import Passage, score_all
from fp8lm.generate.model import InferenceModel
from fp8lm.pictures import save_figure
from fp8lm.runtime.errors import InputError

NAMES = ("Oslo", "Lima", "Cairo", "Delhi", "Paris", "Quito", "Seoul", "Tunis")
DIGITS = (1000, 9999)


@dataclass(frozen=True)
class Trial:
    """Token ids of the needle, of the question that it answers, and of the answer."""

    needle: list[int]
    question: list[int]
    answer: list[int]

    @classmethod
    def draw(cls, tokenizer: Tokenizer, draw: random.Random) -> Trial:
        """With a random name and number."""
        name, number = draw.choice(NAMES), draw.randint(*DIGITS)
        question = f"\nThe number of {name} is"
        texts = (f"{question} {number}.\n", question, f" {number}.")
        return cls(*(tokenizer.tokenize(text) for text in texts))

    def passage(self, haystack: Sequence[int], length: int, depth: float) -> Passage:
        """`length` tokens before the answer, with the needle at `depth` (0 to 1) of the text."""
        room = length - len(self.needle) - len(self.question)
        cut = round(depth * room)
        text = [*haystack[:cut], *self.needle, *haystack[cut:room]]
        return Passage([*text, *self.question, *self.answer], len(self.answer))

    def without_needle(self, haystack: Sequence[int], length: int) -> Passage:
        """As many tokens of text alone."""
        text = haystack[: length - len(self.question)]
        return Passage([*text, *self.question, *self.answer], len(self.answer))


@dataclass(frozen=True)
class NeedleReport:
    """`recall` and `gain` by depth (rows) and length (columns), means over `trials`."""

    lengths: list[int]
    depths: list[float]
    trials: int
    recall: list[list[float]]
    gain: list[list[float]]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def find_needles(
    model: InferenceModel,
    text: Path,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    batch_size: int,
    seed: int = 0,
) -> NeedleReport:
    """Score every length and depth; a collective of all ranks.

    Raises `InputError` for a text that is too short, and lengths beyond the context.
    """
    haystack = _haystack(text, model.tokenizer, max(lengths))
    draw = random.Random(seed)
    drawn = [Trial.draw(model.tokenizer, draw) for _ in range(trials)]
    _check_lengths(lengths, drawn, model.context_length)
    cells = [(depth, length) for depth in depths for length in lengths]
    with_needle = [
        trial.passage(haystack, length, depth) for depth, length in cells for trial in drawn
    ]
    without = [trial.without_needle(haystack, length) for length in lengths for trial in drawn]
    scores = score_all(model, [*with_needle, *without], batch_size, "needles")
    found, controls = scores[: len(with_needle)], scores[len(with_needle) :]
    recall: list[list[float]] = [[] for _ in depths]
    gain: list[list[float]] = [[] for _ in depths]
    for number in range(len(cells)):
        row, column = divmod(number, len(lengths))
        own = found[number * trials : (number + 1) * trials]
        control = controls[column * trials : (column + 1) * trials]
        recall[row].append(sum(score.is_greedy for score in own) / trials)
        pairs = zip(own, control, strict=True)
        gain[row].append(sum(b.nats - a.nats for a, b in pairs) / trials)
    return NeedleReport(list(lengths), list(depths), trials, recall, gain)


def _haystack(text: Path, tokenizer: Tokenizer, needed: int) -> list[int]:
    try:
        tokens = tokenizer.tokenize(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--needle {text} cannot be read as UTF-8 text: {error}") from error
    if len(tokens) < needed:
        raise InputError(
            f"--needle {text} has {len(tokens)} tokens, and the longest context is {needed}: give "
            "a longer text"
        )
    return tokens


def _check_lengths(lengths: Sequence[int], drawn: Sequence[Trial], context_length: int) -> None:
    least = max(len(trial.needle) + len(trial.question) for trial in drawn)
    most = context_length + 1 - max(len(trial.answer) for trial in drawn)
    for length in lengths:
        if not least <= length <= most:
            raise InputError(
                f"--needle-lengths {length} is outside {least} .. {most}: the needle and its "
                f"question have {least} tokens, and the model's context is {context_length}"
            )


def heat_map(reports: dict[str, NeedleReport], path: Path) -> None:
    """Draw recall and gain of every model."""
    from matplotlib.figure import Figure  # without a display, and half a second to import

    size = (9.0, 0.8 + 2.6 * len(reports))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(reports), 2, squeeze=False)
    gains = [abs(value) for r in reports.values() for row in r.gain for value in row]
    largest = max(1.0, *gains)  # colors tell nothing of less than a nat
    for (name, report), pair in zip(reports.items(), axes, strict=True):
        maps = (
            ("recall", report.recall, "viridis", (0.0, 1.0), "{:.0%}"),
            ("gain, nats", report.gain, "RdBu", (-largest, largest), "{:.2f}"),
        )
        for axis, (label, values, colors, limits, form) in zip(pair, maps, strict=True):
            image = axis.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
            axis.set_title(f"{name}: {label}")
            axis.set_xticks(range(len(report.lengths)), report.lengths)
            axis.set_yticks(range(len(report.depths)), [f"{d:.0%}" for d in report.depths])
            axis.set_xlabel("tokens of context")
            axis.set_ylabel("depth")
            _write_values(axis, values, form, limits)
            figure.colorbar(image, ax=axis)
    save_figure(figure, path, dpi=120)


def _write_values(
    axis: Any, values: list[list[float]], form: str, limits: tuple[float, float]
) -> None:
    middle = (limits[0] + limits[1]) / 2
    reach = (limits[1] - limits[0]) / 2
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            # viridis is dark below its middle, RdBu at both ends.
            dark = value < middle if limits[0] == 0.0 else abs(value - middle) > 0.6 * reach
            color = "white" if dark else "black"
            axis.text(column, row, form.format(value), ha="center", va="center", color=color)
