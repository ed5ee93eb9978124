"""metrics.jsonl: one JSON object per report, each number exactly as it was."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import (
    make_folder,
    open_regular,
    open_to_append,
    remove_unfinished,
    write_whole,
)
from fp8lm.runtime.streams import warn

NAME = "metrics.jsonl"


class MetricsFile:
    """Appends to `folder`/metrics.jsonl, line by line on disk.

    Floats keep all their digits; NaN and the infinities, which JSON lacks, become null. A run that
    resumes at `first_iteration` cuts the lines of later iterations off, a new one (0) all of them,
    so that every iteration is there once. Raises `InputError` if `folder` cannot be written to at
    the start; later, on a full disk, lines wait in memory for space, with one warning.
    """

    def __init__(self, folder: Path, first_iteration: int) -> None:
        self._path = folder / NAME
        self._unwritten = b""
        self._warned = False
        try:
            make_folder(folder)
            self._file = self._open(first_iteration)
        except OSError as error:
            raise InputError(f"cannot write to logging.dir = {folder}: {error.strerror}") from error

    def rewind(self, iteration: int) -> None:
        """Cut the lines of later iterations off."""
        try:
            reopened = self._open(iteration)
        except OSError as error:
            warn(f"{self._path} keeps lines after iteration {iteration}: {error}")
            return
        self._file.close()
        self._file = reopened

    def _open(self, iteration: int) -> BinaryIO:
        remove_unfinished(self._path)
        if os.path.lexists(self._path):
            write_whole(self._path, "".join(_lines_until(self._path, iteration)))
        return open_to_append(self._path, buffering=0)

    def write(self, values: Mapping[str, float]) -> None:
        """Append one object."""
        line = json.dumps({key: _as_json(value) for key, value in values.items()}) + "\n"
        self._unwritten += line.encode()
        self._make_anew_if_removed()
        error = self._write_waiting()
        if error is not None and not self._warned:
            self._warned = True
            warn(f"{self._path} waits for space on the disk: {error}")

    def close(self, may_write: bool = True) -> None:
        """Close the file, after a last attempt at the lines that wait, if it `may_write`."""
        if may_write and (error := self._write_waiting()) is not None:
            lines = self._unwritten.count(b"\n")
            warn(f"{self._path} lacks its last {lines} lines: {error}")
        self._file.close()

    def _make_anew_if_removed(self) -> None:
        if os.fstat(self._file.fileno()).st_nlink:
            return
        try:
            make_folder(self._path.parent)
            anew = open_to_append(self._path, buffering=0)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn(f"{self._path} has been removed, and cannot be made again: {error}")
            return
        warn(f"{self._path} has been removed: what is reported from here on is in a new one")
        self._file.close()
        self._file = anew

    def _write_waiting(self) -> OSError | None:
        try:
            while self._unwritten:
                # A write may take a part, and the next one tell that the disk is full.
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            return error
        return None


def _as_json(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(path: Path, last: int) -> Iterator[str]:
    if last == 0:
        return
    with open_regular(path) as file:
        for line in io.TextIOWrapper(file, encoding="utf-8", errors="replace"):
            try:
                iteration = json.loads(line)["iteration"]
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a killed process
            if iteration <= last:
                yield line
