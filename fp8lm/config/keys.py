"""The table of all keys, read off the sections: what `--help` and error messages say of a key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fp8lm.config.megatron_keys import megatron_advice, megatron_names
from fp8lm.config.root import Config

NEAR = 0.82  # of difflib: a spelling mistake or two, not another word
NEAR_SECTION = 0.75
MOST_SUGGESTED = 3
SHORT = 6  # letters, of which one more or less makes another word
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
        kind: Any = field.annotation
        schema = definitions[kind.__name__]
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
    """Say what an unknown `section.name`, section or bare name most likely means.

    A key of similar spelling, the replacement of a Megatron flag, or where to look.
    """
    section, _, name = _snake(path).rpartition(".")
    with_section = f"{section.rpartition('.')[2]}.{name}"
    if (advice := megatron_advice(with_section)) is not None:
        return advice
    if (meant := find_key(path, keys)) is not None:
        return f"did you mean {meant}?"
    sections = list(dict.fromkeys(key.section for key in keys.values()))
    if path == "base":
        return "write it into a file, and give that with --config"
    if (advice := megatron_advice(name)) is not None:
        return advice
    if not section and (near := difflib.get_close_matches(name, sections, 1, NEAR_SECTION)):
        return f"did you mean {near[0]}?"
    if (advice := _near(section, name, keys)) is not None:
        return advice
    inside = section.partition(".")[0] in sections
    return "--help lists its keys" if inside else f"the sections are {', '.join(sections)}"


def find_key(path: str, keys: Mapping[str, Key]) -> str | None:
    """The key that `path` means, ignoring dashes, capitals and a wrong or missing section."""
    path = _snake(path)
    if path in keys:
        return path
    name = path.rpartition(".")[2]
    for key in keys:
        if name in (key.rpartition(".")[2], key.replace(".", "_")):
            return key
    return None


def _near(section: str, name: str, keys: Mapping[str, Key]) -> str | None:
    """Keys spelled like `name`: those of its section, else of all sections, else Megatron's."""
    everywhere = {key.name.rpartition(".")[2]: key.path for key in keys.values()}
    inside = {
        key.name.rpartition(".")[2]: key.path
        for key in keys.values()
        if _is_like(section, key.path.rpartition(".")[0])
    }
    others = [other for other in megatron_names() if len(other) > SHORT]
    for names in (inside, everywhere):
        if near := difflib.get_close_matches(name, [*names, *others], 1, NEAR):
            found = names.get(near[0])
            advice = f"{near[0]}? {megatron_advice(near[0])}"
            return f"did you mean {advice if found is None else f'{found}?'}"
    words = set(name.split("_"))
    for names in (inside, {} if section else everywhere):
        partly = [path for other, path in names.items() if words <= set(other.split("_"))]
        if 0 < len(partly) <= MOST_SUGGESTED:
            return f"did you mean {' or '.join(partly)}?"
    return None


def _is_like(section: str, other: str) -> bool:
    return section == other or bool(difflib.get_close_matches(section, [other], 1, NEAR_SECTION))


def _snake(path: str) -> str:
    return path.replace("-", "_").lower()


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
