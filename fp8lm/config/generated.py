"""Texts generated from the config keys: `--help`, the reference page, the JSON schema."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from fp8lm.config.keys import Key, flatten, list_keys
from fp8lm.config.precision import PRESETS
from fp8lm.config.root import Config
from fp8lm.config.section import EXPONENT

WIDTH = 100
HEADER = """\
# Config reference

<!-- Generated: python -m fp8lm.config --reference > docs/reference/config.md -->

Every key, with its type, its default and its meaning. `python pretrain_gpt.py --help` prints the
same. How files, bases and overrides combine is described in
[Configuration](../user-guide/config.md).
"""


def help_text(program: str) -> str:
    """Write the usage of a command that takes a config, and the table of all keys."""
    keys = list_keys()
    parts = [
        f"usage: {program} [--config FILE.yaml] [section.key=value ...]",
        textwrap.fill(
            "Keys come from FILE.yaml, from the files its top-level `base` names, and from the "
            "command line; later ones win. Values are YAML: numbers, true, null, [1, 2], text. In "
            "names of files and folders `~` and `$VARIABLE` are expanded.",
            WIDTH,
        ),
    ]
    for section, field in Config.model_fields.items():
        lines = [f"{section}: {field.description}"]
        lines += [_describe(key) for key in keys.values() if key.section == section]
        parts.append("\n".join(lines))
    parts.append(_preset_table())
    return "\n\n".join(parts) + "\n"


def _describe(key: Key) -> str:
    default = key.default if key.default == "required" else f"default {key.default}"
    meaning = textwrap.fill(key.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {key.path}: {key.type}; {default}\n{meaning}"


def _preset_table() -> str:
    lines = [
        "  ".join(cell.ljust(24 if i == 0 else 10) for i, cell in enumerate(row))
        for row in [("preset", *PRESETS), *_preset_rows()]
    ]
    return "What the presets say:\n" + "\n".join(f"  {line}".rstrip() for line in lines)


def reference_text() -> str:
    """Write the page: a table of keys for each section, and the table of presets."""
    keys = list_keys().values()
    parts = [HEADER]
    for section, field in Config.model_fields.items():
        rows = [_row(key) for key in keys if key.section == section]
        parts.append(
            "\n".join(
                [
                    f"## {section}\n\n{field.description}\n",
                    "| key | type | default | meaning |\n|---|---|---|---|",
                    *rows,
                ]
            )
            + "\n"
        )
    rows = [
        "| key | " + " | ".join(f"`{name}`" for name in PRESETS) + " |",
        "|---" * (1 + len(PRESETS)) + "|",
        *(f"| `precision.{name}` | " + " | ".join(cells) + " |" for name, *cells in _preset_rows()),
    ]
    parts.append("## Presets\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    kind = key.type.replace(" | ", ", ")
    return f"| `{key.path}` | {kind} | {key.default} | {_escape(key.meaning)} |"


def _preset_rows() -> list[tuple[str, ...]]:
    """A key that presets fill, and what each says."""
    presets = [flatten(preset) for preset in PRESETS.values()]
    return [(name, *(str(preset[name]).lower() for preset in presets)) for name in presets[0]]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


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
