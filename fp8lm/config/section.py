"""The base of every config section, and the scalar types its keys are made of.

Scalars are strict: `true` is not a number and `"10"` is not 10. Numbers mean what they say,
however they are written: an integer may stand where a number is asked for, `1e6` where an integer
is, and `"2e-3"` is a number, since half of the readers of YAML take `2e-3` for text.

A *derived* key has a rule instead of a default: leaving it out, or writing null, takes what the
rule gives from the keys above it, so a validated section is fully resolved.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

EXPONENT = r"^([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"  # text to YAML 1.1, a number to 1.2


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and re.match(EXPONENT, value) else value


def _integer(value: Any) -> Any:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_list(value: Any) -> Any:
    """One text in place of a list of texts."""
    return (value,) if isinstance(value, str) else value


Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Texts = Annotated[
    tuple[Text, ...], BeforeValidator(as_list, json_schema_input_type=list[Text] | Text)
]
Count = Annotated[int, Strict(), Field(ge=1), BeforeValidator(_integer)]
Size = Annotated[int, Strict(), Field(ge=0), BeforeValidator(_integer)]
Positive = Annotated[float, Strict(), Field(gt=0), BeforeValidator(_number)]
NonNegative = Annotated[float, Strict(), Field(ge=0), BeforeValidator(_number)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1), BeforeValidator(_number)]
Smoothing = Annotated[float, Strict(), Field(ge=0, lt=0.5), BeforeValidator(_number)]
PositiveShare = Annotated[float, Strict(), Field(gt=0, le=1), BeforeValidator(_number)]


class Section(BaseModel):
    """Frozen keys of one topic; an unknown key is an error, null stands for a derived value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_derived(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        derived = {name for name, field in cls.model_fields.items() if field.default_factory}
        return {k: v for k, v in values.items() if v is not None or k not in derived}


def derived(rule: Callable[[dict[str, Any]], Any], rule_text: str, description: str) -> Any:
    """Declare a key whose value is `rule(the section's earlier keys)` unless it is given."""
    return Field(
        default_factory=rule,
        description=f"{description} Null: {rule_text}.",
        json_schema_extra=_allow_null,
    )


def _allow_null(schema: dict[str, Any]) -> None:
    described: dict[str, Any] = {
        key: schema.pop(key) for key in ("description", "title") if key in schema
    }
    value_schema = dict(schema)
    schema.clear()
    schema.update(described, anyOf=[value_schema, {"type": "null"}], default=None)
