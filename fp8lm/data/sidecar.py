"""`P.json`, which tools/preprocess_data.py writes beside `P.bin` and `P.idx`: how they were made.

Only `tokenizer` and `append_eod` were always there; every other field may be missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from fp8lm.runtime.errors import InputError


class Sidecar(BaseModel):
    """What is recorded of token files; fields of later versions are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)

    tokenizer: dict[str, Any]
    append_eod: bool | None = None
    prepend_bos: bool = False
    bos: NonNegativeInt | None = None
    parse_special_tokens: bool | None = None
    documents: NonNegativeInt | None = None
    tokens: NonNegativeInt | None = None
    min_id: int | None = None
    max_id: int | None = None
    bin_sha256: str | None = None
    idx_sha256: str | None = None


def read_sidecar(prefix: str) -> Sidecar | None:
    """The sidecar of token files, None where there is none; `InputError` if it is unreadable."""
    path = Path(prefix + ".json")
    if path.exists() and not path.is_file():  # reading a pipe would wait
        raise InputError(f"{path} is not a regular file: remove it or preprocess again")
    try:
        return Sidecar.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise InputError(
            f"{path} does not name a tokenizer: remove it or preprocess again"
        ) from None
    except OSError as err:
        raise InputError(f"cannot read {path}: {err.strerror or err}") from None
