"""Prompts from a file, and completions for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8lm.generate.decoding import Completion
from fp8lm.runtime.errors import InputError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")


def read_prompts(path: Path) -> list[str]:
    """A prompt per line, blank lines left out; of JSON lines the text under `prompt`.

    `InputError` for a file that cannot be read, or has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--prompts-file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InputError(f"--prompts-file {path} is not UTF-8 text") from None
    # Not splitlines: that divides at characters which may be in a prompt.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"--prompts-file {path} has no prompts: write one on each line")
    if path.suffix not in JSON_SUFFIXES:
        return [line for _, line in numbered]
    return [_prompt_of(line, f"--prompts-file {path}, line {number}") for number, line in numbered]


def _prompt_of(line: str, place: str) -> str:
    try:
        content = json.loads(line)
    except ValueError:
        raise InputError(f"{place} is not JSON") from None
    except RecursionError:
        raise InputError(f"{place} is nested too deeply") from None
    if not isinstance(content, dict) or not isinstance(prompt := content.get("prompt"), str):
        raise InputError(f'{place} is not an object with a text under "prompt"')
    if not is_text(prompt):
        raise InputError(f"{place} has half a surrogate pair, which is not text")
    return prompt


def is_text(prompt: str) -> bool:
    """Whether UTF-8 can express it: no half of a surrogate pair is in it."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_json(completion: Completion, prompt: str) -> dict[str, Any]:
    """What a line of `--json` holds."""
    return {
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "prompt_tokens": completion.prompt,
        "finish_reason": completion.finish,
    }
