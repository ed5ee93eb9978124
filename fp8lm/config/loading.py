"""From YAML files and dotted overrides to a `Config`, or to one `InputError`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fp8lm.config.checks import find_problems
from fp8lm.config.keys import Key, list_keys, suggest
from fp8lm.config.merging import Layer, merge
from fp8lm.config.options import cure_override
from fp8lm.config.paths import expand_keys
from fp8lm.config.root import Config
from fp8lm.config.yaml_format import parse_value, read_mapping
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.paths import expand


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, the files its `base` names, and `section.key=value` overrides.

    In the names of all files `~` and `$VARIABLE` are expanded.
    """
    file = Path(expand(os.fspath(path), "--config"))
    layer = parse_overrides(overrides)
    try:
        content = merge(_read_layers(file, ()), layer)
    except _BadBase as error:
        content = merge(read_mapping(file), layer)
        content.pop("base", None)
        raise InputError("; ".join([str(error), *_mistakes(content)])) from None
    content, problems = expand_keys(Config, content)
    return _build(content, problems)


def build_config(content: Mapping[str, Any]) -> Config:
    """Validate sections given as plain mappings; raise `InputError` with all that is wrong."""
    return _build(content, [])


def _build(content: Mapping[str, Any], problems: list[str]) -> Config:
    """The same, with `problems` that were found before."""
    config = None
    given = {section: {} if keys is None else keys for section, keys in content.items()}
    try:
        config = Config.model_validate(_with_all_sections(given))
    except ValidationError as error:
        mistakes, missing = _explain(error, given)
        problems = [*problems, *mistakes, *missing]
    else:
        problems = [*problems, *find_problems(config)]
    if problems or config is None:
        raise InputError("; ".join(problems))
    return config


def _with_all_sections(given: Mapping[str, Any]) -> dict[str, Any]:
    # An absent section is an empty one: then the keys it must have are named, not the section.
    return {**{section: {} for section in Config.model_fields}, **given}


def _mistakes(content: Mapping[str, Any]) -> list[str]:
    """What is wrong in a part of a config, which may lack keys."""
    try:
        Config.model_validate(_with_all_sections(content))
    except ValidationError as error:
        return _explain(error, content)[0]
    return []  # sections may agree with what is not here


def parse_overrides(overrides: Iterable[str]) -> Layer:
    """Turn `section.key=value` texts into one layer; values are YAML.

    None may be empty: a folder in a variable of the shell that is not set would mean no folder.
    """
    layer: Layer = {}
    overrides = list(overrides)
    for place, override in enumerate(overrides):
        path, equals, text = override.partition("=")
        *parents, name = path.split(".")
        if not equals or not all((*parents, name)):
            cure = cure_override(overrides, place)
            raise InputError(f"override {_cut(override)!r}: {cure}")
        if not text.strip():
            after = "".join(overrides[place + 1 : place + 2])
            cure = f"{path}=null means none"
            if after and "=" not in after:
                cure = f"write {path}={after}, without a space"
            raise InputError(f"override {_cut(override)!r} has no value: {cure}")
        inner = layer
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise InputError(f"override {_cut(override)!r}: {parent} was given a value before")
        inner[name] = parse_value(text, f"override {_cut(override)!r}")
    return layer


class _BadBase(InputError):
    """What `base` names cannot be read."""


def _read_layers(path: Path, below: tuple[Path, ...]) -> Layer:
    """Read a file over the files that its `base` names, relative to it; `below` is who asked."""
    path = Path(os.path.normpath(path))
    if any(_is_same(path, other) for other in below):
        chain = " -> ".join(str(file) for file in (*below, path))
        raise _BadBase(f"base files form a cycle: {chain}")
    if below and not path.exists():
        raise _BadBase(f"base file {path} does not exist: named by base in {below[-1]}")
    content = read_mapping(path)
    layer: Layer = {}
    for base in _base_names(content.pop("base", None), path):
        layer = merge(layer, _read_layers(path.parent / _expanded(base, path), (*below, path)))
    return merge(layer, content)


def _expanded(base: str, path: Path) -> str:
    try:
        return expand(base, f"{path}: base")
    except InputError as error:
        raise _BadBase(str(error)) from None


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _base_names(base: Any, path: Path) -> list[str]:
    names = base if isinstance(base, list) else [] if base is None else [base]
    if not all(isinstance(name, str) and name for name in names):
        raise _BadBase(f"{path}: base = {_show(base)}: expected a file name or a list of them")
    return names


def _explain(error: ValidationError, content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Mistakes, and keys that are missing."""
    keys = list_keys()
    unknown, wrong, missing = [], {}, []
    for problem in error.errors():
        kind, place = problem["type"], problem["loc"][:2]
        if ".".join(map(str, problem["loc"][:3])) in keys or kind == "extra_forbidden":
            place = problem["loc"][:3]  # a key inside a group of keys
        path = ".".join(str(part) for part in place)
        if kind in ("extra_forbidden", "invalid_key"):
            unknown.append(f"unknown key {path}: {suggest(path, keys)}")
        elif kind == "missing" and len(problem["loc"]) == 2:
            missing.append(f"{path} is missing: {keys[path].type}")
        elif kind != "default_factory_not_called":
            value = _value_at(content, place)
            expected = keys[path].type if path in keys else _section_for(path, value, keys)
            wrong[path] = f"{path} = {_show(value)}: expected {expected}"
    return [*unknown, *wrong.values()], missing


def _section_for(section: str, value: Any, keys: Mapping[str, Key]) -> str:
    """What to write for a section that was given the `value` of one of its keys."""
    of_section = [key for key in keys.values() if key.section == section]
    meant = next((key for key in of_section if value in key.type.split(" | ")), None)
    return "a section of keys" if meant is None else f"{meant.path}={value}"


def _value_at(content: Mapping[str, Any], place: tuple[Any, ...]) -> Any:
    value: Any = content
    for part in place:
        value = value[part]
    return value


def _show(value: Any) -> str:
    return _cut(json.dumps(value, default=str))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
