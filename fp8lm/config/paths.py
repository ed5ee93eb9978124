"""Keys that name files and folders: expanded once, when a config is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeGuard, get_args

from pydantic import BaseModel, Field, Strict

from fp8lm.runtime.errors import InputError
from fp8lm.runtime.paths import expand

_IS_PATH = "names a file or a folder"
PathText = Annotated[str, Strict(), Field(min_length=1), _IS_PATH]


def expand_keys(
    section: type[BaseModel], content: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """`content` of a section with its path keys expanded, and what could not be."""
    expanded, problems = dict(content), []
    for name, field in section.model_fields.items():
        value, key = content.get(name), f"{prefix}{name}"
        annotation: Any = field.annotation
        if _is_section(annotation) and isinstance(value, Mapping):
            expanded[name], more = expand_keys(annotation, value, f"{key}.")
            problems += more
        elif value is not None and any(_marks(field.annotation, field.metadata)):
            try:
                expanded[name] = _expand_value(value, key)
            except InputError as error:
                problems.append(str(error))
    return expanded, problems


def _expand_value(value: Any, key: str) -> Any:
    if isinstance(value, list | tuple):
        return [_expand_value(item, key) for item in value]
    return expand(value, key) if isinstance(value, str) else value


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _marks(annotation: Any, metadata: Any) -> Iterator[bool]:
    """Whether a type is a `PathText`, or made of one."""
    yield any(mark is _IS_PATH for mark in metadata)
    for part in get_args(annotation):
        if part is not annotation:
            yield from _marks(part, getattr(part, "__metadata__", ()))
