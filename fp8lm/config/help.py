"""The text of `--help`: every key with its type, default and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from fp8lm.config.keys import Key, list_keys
from fp8lm.config.precision import PRESETS
from fp8lm.config.root import Config

WIDTH = 100


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
    rows = [("preset", *PRESETS)]
    for key, value in PRESETS["o3"].items():
        if isinstance(value, Mapping):
            for name in value:
                cells = (preset[key][name] for preset in PRESETS.values())
                rows.append((f"{key}.{name}", *cells))
        else:
            rows.append((key, *(str(preset[key]).lower() for preset in PRESETS.values())))
    lines = ["  ".join(cell.ljust(24 if i == 0 else 10) for i, cell in enumerate(r)) for r in rows]
    return "What the presets say:\n" + "\n".join(f"  {line}".rstrip() for line in lines)
