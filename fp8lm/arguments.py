"""For argparse: types of numbers within bounds and of paths; overrides among options."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp8lm.runtime.errors import InputError
from fp8lm.runtime.paths import expand

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)+=")


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """`argv` without its `section.key=value`s, and these.

    For commands with options of several values, which would take the overrides behind them.
    """
    overrides = [text for text in argv if _OVERRIDE.match(text)]
    return [text for text in argv if not _OVERRIDE.match(text)], overrides


def number_type(least: int, most: int | None = None, why: str = "") -> Callable[[str], int]:
    """A type of whole numbers from `least` (0 or more) to `most`; `why` explains the maximum."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}")
        if most is not None and int(text) > most:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {most}{why and f': {why}'}")
        return int(text)

    return number


def finite(text: str) -> float:
    """A number of 0 or more, neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def path_text(text: str) -> str:
    """A path as text, with `~` and variables expanded as in a config."""
    try:
        return expand(text, text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def as_path(text: str) -> Path:
    """`path_text` as a `Path`."""
    return Path(path_text(text))


def file_to_write(text: str) -> Path:
    """A path of a file, refused where it cannot be written, before there is anything to write."""
    path = as_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: it is a folder")
    if path.is_file() or not path.exists():  # no device or pipe
        _check_folder(text, path.absolute().parent)
    return path


def folder_to_write(text: str) -> Path:
    """A path of a folder, refused where it is a file or cannot be made."""
    path = as_path(text)
    _check_folder(text, path.absolute())
    return path


def _check_folder(text: str, folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: no permission in {there}")


class EachOnce(argparse.Action):
    """Stores several values, and refuses one that comes twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """See argparse."""
        if twice := {value for value in values if values.count(value) > 1}:
            raise argparse.ArgumentError(self, f"{', '.join(map(str, sorted(twice)))} comes twice")
        setattr(namespace, self.dest, values)


def instead(cure: str) -> Callable[[str], str]:
    """The type of an option that only other programs have; `cure` says what to use instead."""

    def refuse(_: str) -> str:
        raise argparse.ArgumentTypeError(f"not an option here: {cure}")

    return refuse
