"""The table of all keys, read off the sections: what `--help` and error messages say of a key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fp8lm.config.root import Config

_TYPE_NAMES = {"integer": "integer", "number": "number", "string": "text", "null": "null"}
_BOUNDS = (
    ("exclusiveMinimum", ">"),
    ("minimum", ">="),
    ("exclusiveMaximum", "<"),
    ("maximum", "<="),
)


@dataclass(frozen=True)
class Key:
    """One key: its section, its name, and its type, default and meaning in words.

    A key inside a group of keys has a name of two parts, `wire.gather`.
    """

    section: str
    name: str
    type: str
    default: str
    meaning: str

    @property
    def path(self) -> str:
        """`section.name`, as on the command line."""
        return f"{self.section}.{self.name}"


def list_keys() -> dict[str, Key]:
    """Map `section.name` to every key, in the order of the sections."""
    definitions = Config.model_json_schema()["$defs"]
    keys = {}
    for section, field in Config.model_fields.items():
        schema = definitions[field.annotation.__name__]
        for key in _keys_of(section, schema, definitions):
            keys[key.path] = key
    return keys


def _keys_of(
    section: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = ""
) -> Iterator[Key]:
    required = schema.get("required", ())
    for name, value in schema["properties"].items():
        if "$ref" in value:
            group = definitions[value["$ref"].rpartition("/")[2]]
            yield from _keys_of(section, group, definitions, f"{prefix}{name}.")
            continue
        default = "required" if name in required else _value_text(value.get("default"))
        yield Key(section, prefix + name, type_text(value), default, value["description"])


def type_text(schema: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema allows: `integer >= 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(type_text(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if schema["type"] == "boolean":
        return "true | false"
    if schema["type"] == "array" and "prefixItems" in schema:
        return f"[{', '.join(type_text(item) for item in schema['prefixItems'])}]"
    if schema["type"] == "array":
        return f"list of ({type_text(schema['items'])})"
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in _BOUNDS if bound in schema]
    return " ".join([_TYPE_NAMES[schema["type"]], " and ".join(bounds)]).rstrip()


def suggest(path: str, keys: Mapping[str, Key]) -> str:
    """Say what an unknown `section.name`, section or bare name most likely means."""
    section, _, name = path.partition(".") if "." in path else ("", "", path)
    sections = list(dict.fromkeys(key.section for key in keys.values()))
    if not section and (near := difflib.get_close_matches(name, sections, 1)):
        return f"did you mean {near[0]}?"
    elsewhere = {key.name: key.path for key in keys.values()}
    if name in elsewhere:
        return f"did you mean {elsewhere[name]}?"
    if section not in sections and (near := difflib.get_close_matches(section, sections, 1)):
        section = near[0]
    inside = {key.name: key.path for key in keys.values() if key.section == section}
    for names in (inside, elsewhere):
        if near := difflib.get_close_matches(name, names, 1, cutoff=0.65):
            return f"did you mean {names[near[0]]}?"
    return "--help lists its keys" if inside else f"the sections are {', '.join(sections)}"


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
