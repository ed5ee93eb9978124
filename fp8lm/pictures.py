"""Pictures that matplotlib draws, in the format that their name says."""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8lm.arguments import file_to_write
from fp8lm.data.files import write_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture_path(text: str) -> Path:
    """For argparse: the path of a picture to write, refused before anything is measured for it."""
    from matplotlib.backend_bases import FigureCanvasBase  # a third of a second to import

    path = file_to_write(text)
    known = FigureCanvasBase.get_supported_filetypes()
    if _format(path) not in known:
        raise argparse.ArgumentTypeError(f"{text}: a picture is one of {', '.join(sorted(known))}")
    return path


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write `figure` whole or not at all; `options` are those of `savefig`.

    Creates its folder; `InputError` where it cannot be written.
    """
    picture = BytesIO()
    figure.savefig(picture, format=_format(path), **options)
    write_aside(path, picture.getvalue())


def _format(path: Path) -> str:
    """What the end of a name says; PNG if it says nothing."""
    return path.suffix.removeprefix(".").lower() or "png"
