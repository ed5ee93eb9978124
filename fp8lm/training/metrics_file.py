"""metrics.jsonl: one JSON object per report, each number exactly as it was."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from fp8lm.errors import InputError

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends to `folder`/metrics.jsonl, line by line on disk.

    Floats keep all their digits; NaN and the infinities, which JSON lacks, become null. A run that
    resumes at `first_iteration` cuts the lines of later iterations off, a new one (0) all of them,
    so that every iteration is there once. Raises `InputError` if `folder` cannot be written to.
    """

    def __init__(self, folder: Path, first_iteration: int) -> None:
        self._path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open(first_iteration)
        except OSError as error:
            raise InputError(f"cannot write to logging.dir = {folder}: {error}") from error

    def go_back(self, iteration: int) -> None:
        """Cut the lines of later iterations off."""
        self._file.close()
        self._file = self._open(iteration)

    def _open(self, iteration: int) -> TextIO:
        if self._path.exists():
            _keep(self._path, list(_lines_until(self._path, iteration)))
        return self._path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, float]) -> None:
        """Append one object."""
        self._file.write(json.dumps({key: _as_json(value) for key, value in values.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _as_json(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(path: Path, last: int) -> Iterator[str]:
    if last == 0:
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                iteration = json.loads(line)["iteration"]
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a killed process
            if iteration <= last:
                yield line


def _keep(path: Path, lines: list[str]) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(lines), encoding="utf-8")
    os.replace(aside, path)
