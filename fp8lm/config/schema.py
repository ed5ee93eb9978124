"""The JSON schema by which editors complete and check the YAML files under configs/."""

from __future__ import annotations

import json
from typing import Any

from fp8lm.config.root import Config


def json_schema() -> dict[str, Any]:
    """Describe one YAML file; no key is required in it, because its `base` may have it."""
    schema = _strip(Config.model_json_schema())
    schema["properties"]["base"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
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
