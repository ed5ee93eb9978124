"""The folder of a conversion: not there until all of it is, and continued where it was killed.

.NAME.converting/              what is done so far, beside OUTPUT
.NAME.converting/conversion.json   which conversion: source, options, version
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import make_folder, sync_folder, write_whole

JOURNAL = "conversion.json"


def check_output(output: Path) -> None:
    """`InputError` where something is at `output` already."""
    if os.path.lexists(output):
        raise InputError(f"--output {output} is there already: name a folder that is not")


def start_output(output: Path, conversion: Mapping[str, Any]) -> Path:
    """The folder to write in; what the same `conversion` has left in it is kept."""
    check_output(output)
    work = output.with_name(f".{output.name}.converting")
    text = json.dumps(conversion, indent=1, sort_keys=True) + "\n"
    if work.is_symlink() or (work.exists() and not (work / JOURNAL).is_file()):
        raise InputError(f"{work} is in the way: no conversion has left it")
    if work.exists() and (work / JOURNAL).read_text() != text:
        shutil.rmtree(work)
    make_folder(work)
    if not (work / JOURNAL).exists():
        write_whole(work / JOURNAL, text)
    return work


def finish_output(work: Path, output: Path) -> None:
    """Give the folder its name."""
    check_output(output)
    for name in (JOURNAL,):
        (work / name).unlink()
    sync_folder(work)
    work.rename(output)
    sync_folder(output.parent)
