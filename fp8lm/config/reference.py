"""The config reference of the documentation: docs/reference/config.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fp8lm.config.keys import Key, list_keys
from fp8lm.config.precision import PRESETS
from fp8lm.config.root import Config

HEADER = """\
# Config reference

<!-- Generated: python -m fp8lm.config --reference > docs/reference/config.md -->

Every key, with its type, its default and its meaning. `python pretrain_gpt.py --help` prints the
same. How files, bases and overrides combine is described in
[Configuration](../user-guide/config.md).
"""


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
    parts.append("## Presets\n\n" + "\n".join(_preset_rows()) + "\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    kind = key.type.replace(" | ", ", ")
    return f"| `{key.path}` | {kind} | {key.default} | {_escape(key.meaning)} |"


def _preset_rows() -> Iterator[str]:
    yield "| key | " + " | ".join(f"`{name}`" for name in PRESETS) + " |"
    yield "|---" * (1 + len(PRESETS)) + "|"
    for name in _flat(next(iter(PRESETS.values()))):
        cells = (str(_flat(preset)[name]).lower() for preset in PRESETS.values())
        yield f"| `precision.{name}` | " + " | ".join(cells) + " |"


def _flat(preset: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in preset.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
