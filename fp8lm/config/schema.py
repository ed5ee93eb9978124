"""The JSON schema by which editors complete and check the YAML files under configs/."""

from __future__ import annotations

import json
from typing import Any

from fp8lm.config.root import Config
from fp8lm.config.section import EXPONENT


def json_schema() -> dict[str, Any]:
    """Describe one YAML file; no key is required in it, because its `base` may have it."""
    schema = _as_read(_strip(Config.model_json_schema()))
    file = {"type": "string", "minLength": 1}
    schema["properties"]["base"] = {
        "anyOf": [file, {"type": "array", "items": file}, {"type": "null"}],
        "description": "Files this one starts from, relative to it; later ones win.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """Write the schema as the text of configs/schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _strip(schema: dict[str, Any]) -> dict[str, Any]:
    """Drop pydantic's generated titles and the lists of required keys."""
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
        for value in (section, *section["properties"].values()):
            value.pop("title", None)
    return schema


def _as_read(schema: Any) -> Any:
    """`schema` with what the loader reads besides: numbers as text, sections left empty."""
    if isinstance(schema, list):
        return [_as_read(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _as_read(value) for key, value in schema.items()}
    written = None
    if schema.get("type") in ("integer", "number"):
        written = {"type": "string", "pattern": EXPONENT}
    elif "$ref" in schema:
        written = {"type": "null"}
    if written is None:
        return schema
    about = {key: schema.pop(key) for key in ("description", "default") if key in schema}
    return {**about, "anyOf": [schema, written]}
