"""`P.json`, which tools/preprocess_data.py writes beside `P.bin` and `P.idx`: how they were made.

Only `tokenizer` and `append_eod` were always there; every other field may be missing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from fp8lm.runtime.errors import InputError

LARGEST = 2**24  # bytes; a sidecar has some hundred


class Sidecar(BaseModel):
    """What is recorded of token files; fields of later versions are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)

    tokenizer: dict[str, Any]
    append_eod: bool | None = None
    prepend_bos: bool = False
    bos: NonNegativeInt | None = None
    parse_special_tokens: bool | None = None
    format: Literal["text", "chat", "preference"] = "text"
    chat_template: str | None = None
    documents: NonNegativeInt | None = None
    tokens: NonNegativeInt | None = None
    min_id: int | None = None
    max_id: int | None = None
    bin_sha256: str | None = None
    idx_sha256: str | None = None


def read_sidecar(prefix: str) -> Sidecar | None:
    """The sidecar of token files, None where there is none; `InputError` if it is unreadable."""
    path = Path(prefix + ".json")
    if os.path.lexists(path) and not path.is_file():  # reading a pipe would wait
        raise InputError(f"{path} is not a regular file: {not_a_file(path)}, or remove it")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError("no sidecar is so large")
        return Sidecar.model_validate_json(content)
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(
            f"{path} does not name a tokenizer: remove it or preprocess again"
        ) from None
    except OSError as err:
        raise InputError(f"cannot read {path}: {err.strerror or err}") from None


def not_a_file(path: str | os.PathLike[str]) -> str:
    """The cure for a link that leads nowhere, and for all else that cannot be read as a file."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"the link leads to {os.readlink(path)}, which is not there: put it back"
    return "preprocess again"
