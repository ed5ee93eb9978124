"""The JSON schema takes exactly what the loader takes: the same values are tried on both."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import ValidationError

from fp8lm.config import Config
from fp8lm.config.generated import schema_text
from fp8lm.config.keys import list_keys
from fp8lm.config.loading import load_config
from fp8lm.runtime.errors import InputError

SCHEMA = json.loads(schema_text())
VALUES = [None, True, False, 0, 1, 2.0, 1.5, 0.5, -1, 1e300, "", "a", "10", "2e-3", "1e2", "1E+2"]
VALUES += [".5e0", "-1e2", "1e", "e5", [], [1], ["a"], [0, "a"], [""], [1, 1, 1], [True], {}]
VALUES += [{"a": 1}, [[1]], "o3", "fp8", "cosine", "torch_dist", [0.5, "a", 2, "b"]]


def accepts(schema, value):
    """What of JSON schema pydantic writes for this config."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return any(accepts(choice, value) for choice in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    known = {"type", "description", "default", "properties", "additionalProperties", "pattern"}
    known |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "items"}
    known |= {"prefixItems", "minItems", "maxItems", "minLength", "$defs", "$schema"}
    assert schema.keys() <= known, schema
    return CHECKS[schema["type"]](schema, value)


def is_number(schema, value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1 - abs(value))
        and value < schema.get("exclusiveMaximum", value + 1 + abs(value))
    )


def is_array(schema, value):
    if not isinstance(value, list):
        return False
    items = schema.get("prefixItems", [])
    inner = schema.get("items", {})
    fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
    first = all(accepts(item, v) for item, v in zip(items, value, strict=False))
    return fits and first and (not inner or all(accepts(inner, v) for v in value))


def is_object(schema, value):
    properties = schema["properties"]
    return isinstance(value, dict) and all(
        name in properties and accepts(properties[name], v) for name, v in value.items()
    )


CHECKS = {
    "null": lambda schema, value: value is None,
    "boolean": lambda schema, value: isinstance(value, bool),
    "string": lambda schema, value: (
        isinstance(value, str)
        and len(value) >= schema.get("minLength", 0)
        and re.search(schema.get("pattern", ""), value) is not None
    ),
    "integer": lambda schema, value: is_number(schema, value) and value == int(value),
    "number": is_number,
    "array": is_array,
    "object": is_object,
}


def loader_takes(path, value):
    """Whether no complaint is about the key itself: others may be missing beside it."""
    content = value
    for part in reversed(path.split(".")):
        content = {part: content}
    given = {**{section: {} for section in Config.model_fields}, **content}
    try:
        Config.model_validate(given)
    except ValidationError as error:
        place = tuple(path.split("."))
        about = [(p["type"], p["loc"]) for p in error.errors() if p["loc"][: len(place)] == place]
        of_others = {("missing", place), ("default_factory_not_called", place)}
        return not set(about) - of_others
    return True


def schema_takes(path, value):
    content = value
    for part in reversed(path.split(".")):
        content = {part: content}
    return accepts(SCHEMA, content)


def is_out_of_bounds(key, value):
    """A number in text, which a schema cannot compare."""
    return isinstance(value, str) and ("integer" in key.type or "number" in key.type)


@pytest.mark.parametrize("section", list(Config.model_fields))
def test_every_key_takes_the_same_values(section):
    for key in list_keys().values():
        if key.section == section:
            for value in VALUES:
                taken = loader_takes(key.path, value)
                if taken or not is_out_of_bounds(key, value):
                    assert schema_takes(key.path, value) == taken, (key.path, value)


@pytest.mark.parametrize("path", ["precision.wire", *Config.model_fields])
def test_sections_may_be_empty_but_nothing_else(path):
    for value in (None, {}):
        assert schema_takes(path, value)
    for value in (3, [], "a", {"a": 1}):
        assert not schema_takes(path, value)


@pytest.mark.parametrize(
    ("text", "taken"),
    [("", True), ("null", True), ("[]", True), ("c.yaml", True), ("''", False), ("[3]", False)],
)
def test_base(tmp_path, config_file, text, taken):
    (tmp_path / "c.yaml").write_text(f"base: {text}\n" + config_file.read_text())
    value = {"": None, "null": None, "[]": [], "''": "", "[3]": [3]}.get(text, text)
    assert accepts(SCHEMA, {"base": value}) == taken
    try:
        load_config(tmp_path / "c.yaml")
    except InputError as error:
        assert not taken or "cycle" in str(error)
    else:
        assert taken


def test_numbers_are_read_however_they_are_written(config_file):
    texts = ['"2e-3"', "2e-3", "2.E-3", "0.002", "!!str 2e-3"]
    rates = {load_config(config_file, [f"optimizer.lr={text}"]).optimizer.lr for text in texts}
    assert rates == {0.002}
    train = load_config(config_file, ["train.train_iters=1e2", "train.seed=2.0"]).train
    assert (train.train_iters, train.seed) == (100, 2)
    assert type(train.train_iters) is int


def test_a_section_without_keys_says_nothing(config_file, tmp_path):
    (tmp_path / "top.yaml").write_text("base: config.yaml\ntrain:\n  # seed: 3\nmodel: {}\n")
    assert load_config(tmp_path / "top.yaml") == load_config(config_file)
