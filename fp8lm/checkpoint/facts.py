"""common.json: the facts of a checkpoint, validated by a schema before anything uses them.

Keys that this version does not know are kept: a newer one may have added them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import fp8lm
from fp8lm.runtime.errors import InputError

FORMAT_VERSION = 1
LARGEST_COMMON = 2**24  # bytes; a config and a few numbers are some ten thousand
DEEPEST = 32  # levels of lists and objects
MOST_FILES = 64  # of a tokenizer; each is read whole
# No run changes its batch so much; what a checkpoint says of its batch may be its last one's.
BATCH_GROWTH = 1024

Count = Annotated[int, Field(ge=0, lt=2**53)]
Version = Annotated[str, Field(max_length=200, pattern=r"^[\x20-\x7e]*$")]


class Losses(BaseModel):
    """State of the loss-spike detector."""

    model_config = ConfigDict(strict=True, extra="allow")

    mean: Annotated[float, Field(allow_inf_nan=False)]
    steps: Count
    high: Count
    first: Count


class TokenizerFacts(BaseModel):
    """What the model's tokens are: the tokenizer's identity, and the names of its files here."""

    model_config = ConfigDict(strict=True, extra="allow")

    class Identity(BaseModel):
        """See `fp8lm.data.identity`."""

        model_config = ConfigDict(strict=True, extra="allow")

        tokenizer_type: str
        vocab_size: Annotated[int, Field(ge=1, lt=2**31)]

    identity: Identity
    files: Annotated[list[str], Field(max_length=MOST_FILES)]


class DataFacts(BaseModel):
    """One token file and what tells its content from others."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prefix: str
    identity: dict[str, str | int]


class Common(BaseModel):
    """The schema of common.json: types, bounds, and what must agree."""

    model_config = ConfigDict(strict=True, extra="allow")

    format_version: Annotated[int, Field(ge=1)]
    fp8lm_version: Version
    torch_version: Version
    iteration: Count
    consumed_samples: Count | None = None
    batch_size: Count | None = None
    skipped_samples: Count | None = None
    rollbacks: Count | None = None
    losses: Losses | None = None
    config: dict[str, dict[str, Any]] | None = None
    tokenizer: TokenizerFacts | None = None
    data: list[DataFacts] | None = None
    released: bool = False

    @model_validator(mode="after")
    def _counts_agree(self) -> Common:
        consumed, iteration = self.consumed_samples, self.iteration
        if consumed is None:
            return self
        if consumed < iteration:
            raise ValueError(f"{iteration} iterations cannot have consumed {consumed} samples")
        known = self._whole("global_batch_size")
        known += [self.batch_size] if self.batch_size else []
        if known and consumed > iteration * max(known) * BATCH_GROWTH:
            raise ValueError(
                f"{iteration} iterations of about {max(known)} samples cannot have consumed "
                f"{consumed}"
            )
        return self

    @model_validator(mode="after")
    def _skipped_in_rollbacks(self) -> Common:
        skipped, rollbacks = self.skipped_samples, self.rollbacks
        if not skipped or rollbacks is None:
            return self
        # Each skips what a part of the run has read.
        batch = max(self._whole("global_batch_size"), default=1)
        lengths = [*self._whole("train_samples"), *(n * batch for n in self._whole("train_iters"))]
        if skipped > rollbacks * max(lengths, default=self.consumed_samples or 0) * BATCH_GROWTH:
            raise ValueError(f"{rollbacks} rollbacks cannot have skipped {skipped} samples")
        return self

    def _whole(self, key: str) -> list[int]:
        """The positive number that the config's section `train` has as `key`, if it has one."""
        value = (self.config or {}).get("train", {}).get(key)
        return [value] if type(value) is int and value > 0 else []


def parse_common(data: bytes, needed: Collection[str] = ()) -> dict[str, Any]:
    """The facts in the bytes of common.json; `needed` keys must be among them.

    One such as `config.model` is in the object of the other, and holds something.

    ValueError if they make no sense, `InputError` if a newer program has written them.
    """
    common = _parse_json(data)
    version = common.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            f"has format version {version}, written by fp8lm "
            f"{str(common.get('fp8lm_version'))[:40]!r}; this is fp8lm {fp8lm.__version__}, which "
            f"reads up to {FORMAT_VERSION}: upgrade it"
        )
    try:
        Common.model_validate(common)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    if missing := [key for key in needed if not _holds(common, key)]:
        raise ValueError(f"it does not say {', '.join(missing)}")
    return common


def _holds(common: dict[str, Any], key: str) -> bool:
    name, _, inside = key.partition(".")
    value = common.get(name)
    return value is not None and (not inside or bool(value.get(inside)))


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        common = json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    if not isinstance(common, dict):
        raise ValueError("it is not an object")
    for value in _leaves(common):
        if isinstance(value, str):
            value.encode()  # a lone surrogate could be printed and saved nowhere
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number in it is not finite")
    return common


def _leaves(root: Any) -> Iterator[Any]:
    """Every key and every value that holds no others; ValueError beyond `DEEPEST` levels."""
    level = [root]
    for _ in range(DEEPEST):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield from value
                deeper.extend(value.values())
            elif isinstance(value, list):
                deeper.extend(value)
            else:
                yield value
        if not deeper:
            return
        level = deeper
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"{part}: " for part in first["loc"])
    return f"{where}{first['msg'].removeprefix('Value error, ')}"[:300]
