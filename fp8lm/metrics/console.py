"""What a run prints: Megatron's lines, and a progress bar on a terminal. None of it stops a run."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from fp8lm.runtime.files import open_to_append
from fp8lm.runtime.streams import BestEffortStream, warn

MILLISECONDS = 1000.0


class Console:
    """Prints lines to `stream` (None: stdout), above a progress bar if that is a terminal.

    Lines that it cannot print are added to the file `aside`, if there is one; the first time a
    warning says so.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        stream: TextIO | None = None,
        aside: Path | None = None,
    ) -> None:
        self._stream = BestEffortStream(stream or sys.stdout, self._keep)
        self._aside, self._warned = aside, False
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=initial, file=self._stream, dynamic_ncols=True)

    def write(self, line: str) -> None:
        """Print one line at once."""
        tqdm.write(f"{line}\n", file=self._stream, end="")

    def advance(self) -> None:
        """Count one iteration."""
        if self._bar is not None:
            self._bar.update()

    def rewind(self, iteration: int) -> None:
        """Set the bar to `iteration`."""
        if self._bar is not None:
            self._bar.n = iteration
            self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _keep(self, text: str, reason: str) -> None:
        if not self._warned:
            self._warned = True
            where = "" if self._aside is None else f"; what it should say is in {self._aside}"
            warning = f"stdout takes no more ({reason}): the training goes on{where}"
            warn(warning)
            self._add_aside(f" warning: {warning}\n")
        if text.endswith("\n") and text.strip():  # the bar is no line
            self._add_aside(text)

    def _add_aside(self, text: str) -> None:
        if self._aside is not None:
            with suppress(OSError), open_to_append(self._aside) as file:
                file.write(text.encode())


def training_line(values: Mapping[str, float], total: int, when: datetime | None = None) -> str:
    """Megatron's log line of one report; `total` is the number of iterations of the run.

    Reads the keys of metrics.jsonl, `iteration-time` in seconds among them.
    """
    when = when or datetime.now()
    parts = (
        f" [{when:%Y-%m-%d %H:%M:%S}] iteration {values['iteration']:8d}/{total:8d}",
        f"consumed samples: {values['consumed_samples']:6d}",
        f"elapsed time per iteration (ms): {values['iteration-time'] * MILLISECONDS:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {_three_digits(values['throughput'])}",
        f"learning rate: {values['learning-rate']:.4E}",
        f"global batch size: {values['batch-size']:5d}",
        f"lm loss: {values['lm loss']:.4E}",
        f"grad norm: {values['grad-norm']:.3f}",
        f"number of skipped iterations: {values['skipped iterations']:3d}",
        f"number of nan iterations: {values['nan iterations']:3d}",
    )
    return " | ".join(parts) + " |"


def _three_digits(value: float) -> str:
    """Megatron's one decimal, or more of them for three digits of a small number."""
    if not 0.0 < abs(value) < math.inf:
        return f"{value:.1f}"
    return f"{value:.{max(1, 2 - math.floor(math.log10(abs(value))))}f}"


def evaluation_line(split: str, iteration: int, loss: float) -> str:
    """Megatron's line of one evaluation; the perplexity saturates as Megatron's does."""
    perplexity = math.exp(min(20.0, loss))
    return (
        f" {split} loss at iteration {iteration} | lm loss value: {loss:.4E} | "
        f"lm loss PPL: {perplexity:.4E} |"
    )


def metrics_line(split: str, iteration: int, metrics: Mapping[str, float]) -> str:
    """The line of what an objective reports of an evaluation beside its loss."""
    values = " | ".join(f"{name}: {value:.4E}" for name, value in metrics.items())
    return f" {split} metrics at iteration {iteration} | {values} |"


def saved_line(iteration: int, folder: str) -> str:
    """Megatron's line of one saved checkpoint."""
    return f"  successfully saved checkpoint from iteration {iteration} to {folder}"
