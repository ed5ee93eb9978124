"""YAML as the project reads and writes it.

PyYAML follows YAML 1.1, where `1e-4` is text, `on` is true and `010` is eight. The loader here
follows the core schema of YAML 1.2, which editors check files against; the dumper quotes whatever
either version would read as something other than text. A key given twice is an error, and so are
merge keys (`<<`), which 1.2 does not have, and aliases that multiply into more than a config is.
"""

from __future__ import annotations

import codecs
import re
import sysconfig
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fp8lm.runtime.errors import InputError

MOST_BYTES = 16 * 2**20  # of a file
MOST_VALUES = 200_000  # of a config, aliases counted as what they stand for
_CORE = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_SCALARS = (  # the first pattern that matches the whole scalar wins, so integers precede floats
    (f"{_CORE}null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    (f"{_CORE}bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    (f"{_CORE}int", _INT, list("-+0123456789")),
    (f"{_CORE}float", _FLOAT, list("-+.0123456789")),
)


class ConfigLoader(yaml.SafeLoader):
    """Safe loader of YAML 1.2 scalars that refuses a key given twice; all it raises has a place."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own declaration)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; a `ComposerError` for an alias inside of what it stands for."""
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # its end is not read yet
            raise yaml.composer.ComposerError(
                None, None, "an alias stands inside of what it names", node.start_mark
            )
        return node

    def get_single_data(self) -> Any:
        """Read the document; a `ConstructorError` if its aliases make it too large."""
        node = self.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_VALUES} values, aliases written out", node.start_mark
            )
        return self.construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build what a node stands for; a `ConstructorError` if it cannot be what its tag says."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # PyYAML's constructors trust a tag that is written out: `!!int abc`.
            kind = node.tag.removeprefix(_CORE)
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.40} cannot be read as {kind}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; raise a `ConstructorError` with its place for a repeated key."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value == "<<":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    "merge keys (<<) are not read: write the keys out, or share a file by `base`",
                    key_node.start_mark,
                )
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Read decimal, 0o octal or 0x hexadecimal digits."""
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; `known` are those of nodes counted before, by id."""
    if id(node) not in known:
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(node)]


class ConfigDumper(yaml.SafeDumper):
    """Safe dumper whose plain text is text to YAML 1.1 and 1.2 alike."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent list items below their key."""
        return super().increase_indent(flow, False)


ConfigLoader.add_constructor(f"{_CORE}int", ConfigLoader.construct_int)
for _tag, _pattern, _first in _SCALARS:
    _whole = re.compile(rf"^(?:{_pattern.pattern})$")
    ConfigLoader.add_implicit_resolver(_tag, _whole, _first)
    ConfigDumper.add_implicit_resolver(_tag, _whole, _first)


def parse_value(text: str, where: str) -> Any:
    """Read one YAML value, as on the command line; `where` names it in the error."""
    try:
        return _load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not a YAML value ({_problem(error)}); quote it") from error


def to_yaml(content: Any) -> str:
    """Write plain data as YAML, mappings in their own order."""
    return yaml.dump(content, Dumper=ConfigDumper, sort_keys=False)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; empty files count as empty mappings."""
    try:
        content = _load(_read_text(path))
    except FileNotFoundError as error:
        installed = Path(sysconfig.get_path("data"), "share", "fp8lm", "configs")
        where = f": the project's are in {installed}" if installed.is_dir() else ""
        raise InputError(f"config file {path} does not exist{where}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"config file {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}{_line(error)}: not valid YAML: {_problem(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"config file {path} must hold sections of keys, not {content!r:.60}")
    return content


def _read_text(path: Path) -> str:
    """The text of a file, or of a pipe that a shell made; InputError if it is none."""
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(f"config file {path} has more than {MOST_BYTES >> 20} MiB: not a config")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"config file {path} is UTF-16 or UTF-32 text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"config file {path} is not UTF-8 text") from error
    if "\0" in text:
        raise InputError(f"config file {path} is not text: it has a byte of zero")
    return text


def _load(text: str) -> Any:
    try:
        return yaml.load(text, Loader=ConfigLoader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character U+{error.character:04X} is not allowed"
    problem = getattr(error, "problem", None) or str(error)
    return f"{problem}; indent with spaces" if r"'\t'" in problem else problem
