"""From YAML files and dotted overrides to a `Config`, or to one `InputError`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fp8lm.config.keys import list_keys, suggest
from fp8lm.config.merging import Layer, merge
from fp8lm.config.options import cure_override
from fp8lm.config.paths import expand_keys
from fp8lm.config.root import Config
from fp8lm.config.yaml_format import parse_value, read_mapping
from fp8lm.errors import InputError
from fp8lm.runtime.paths import expand


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, the files its `base` names, and `section.key=value` overrides.

    In the names of all files `~` and `$VARIABLE` are expanded.
    """
    file = Path(expand(os.fspath(path), "--config"))
    content = merge(_read_layers(file, ()), parse_overrides(overrides))
    content, problems = expand_keys(Config, content)
    return _build(content, problems)


def build_config(content: Mapping[str, Any]) -> Config:
    """Validate sections given as plain mappings; raise `InputError` with all that is wrong."""
    return _build(content, [])


def _build(content: Mapping[str, Any], problems: list[str]) -> Config:
    """The same, with `problems` that were found before."""
    # An absent section is an empty one: then the keys it must have are named, not the section.
    empty: dict[str, dict[str, Any]] = {section: {} for section in Config.model_fields}
    given = {section: {} if keys is None else keys for section, keys in content.items()}
    try:
        config = Config.model_validate({**empty, **given})
    except ValidationError as error:
        problems = [*problems, _explain(error, given)]
    except InputError as error:  # sections that disagree
        problems = [*problems, str(error)]
    if problems:
        raise InputError("; ".join(problems))
    return config


def parse_overrides(overrides: Iterable[str]) -> Layer:
    """Turn `section.key=value` texts into one layer; values are YAML, an empty one is null."""
    layer: Layer = {}
    overrides = list(overrides)
    for place, override in enumerate(overrides):
        path, equals, text = override.partition("=")
        *parents, name = path.split(".")
        if not equals or not all((*parents, name)):
            cure = cure_override(overrides, place)
            raise InputError(f"override {_cut(override)!r}: {cure}")
        inner = layer
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise InputError(f"override {_cut(override)!r}: {parent} was given a value before")
        inner[name] = parse_value(text, f"override {_cut(override)!r}")
    return layer


def _read_layers(path: Path, below: tuple[Path, ...]) -> Layer:
    """Read a file over the files that its `base` names, relative to it; `below` is who asked."""
    path = Path(os.path.normpath(path))
    if any(_is_same(path, other) for other in below):
        chain = " -> ".join(str(file) for file in (*below, path))
        raise InputError(f"base files form a cycle: {chain}")
    if below and not path.exists():
        raise InputError(f"base file {path} does not exist: named by base in {below[-1]}")
    content = read_mapping(path)
    layer: Layer = {}
    for base in _base_names(content.pop("base", None), path):
        base = expand(base, f"{path}: base")
        layer = merge(layer, _read_layers(path.parent / base, (*below, path)))
    return merge(layer, content)


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _base_names(base: Any, path: Path) -> list[str]:
    names = base if isinstance(base, list) else [] if base is None else [base]
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{path}: base = {_show(base)}: expected a file name or a list of them")
    return names


def _explain(error: ValidationError, content: Mapping[str, Any]) -> str:
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
            expected = keys[path].type if path in keys else "a section of keys"
            wrong[path] = f"{path} = {_show(_value_at(content, place))}: expected {expected}"
    return "; ".join([*unknown, *wrong.values(), *missing])


def _value_at(content: Mapping[str, Any], place: tuple[Any, ...]) -> Any:
    value: Any = content
    for part in place:
        value = value[part]
    return value


def _show(value: Any) -> str:
    return _cut(json.dumps(value, default=str))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
