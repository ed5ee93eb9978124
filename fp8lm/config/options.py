"""Suggestions for arguments that are not of the form `section.key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fp8lm.config.keys import NEAR, Key, find_key, list_keys, suggest
from fp8lm.config.megatron_keys import RENAMED, megatron_advice
from fp8lm.runtime.errors import CommandParser


def explain_options(argv: Sequence[str], unknown: Sequence[str], parser: CommandParser) -> str:
    """Say of every option in `unknown` what to write in its place, with its values in `argv`.

    Those for which there is a key are given together, ready to be copied. `parser` is the one that
    does not know them.
    """
    keys = list_keys()
    options = [option for option in unknown if _is_option(option)] or list(unknown[:1])
    written, explained = {}, []
    for option in dict.fromkeys(options):
        if (meant := _near_option(option, parser.option_names())) is not None:
            explained.append(f"unknown option {option}: did you mean {meant}?")
        elif (override := _as_override(argv, option, keys)) is not None:
            written[option] = override
        else:
            explained.append(f"unknown option {option}: {_advice(option, keys, parser.prog)}")
    if written:
        plural = "s" if len(written) > 1 else ""
        cure = f"unknown option{plural} {', '.join(written)}: write {' '.join(written.values())}"
        explained.insert(0, cure)
    return "; ".join(explained)


def cure_override(overrides: Sequence[str], place: int) -> str:
    """What to write for the override at `place`, which has no key or no `=`."""
    text = overrides[place]
    before = overrides[place - 1] if place else ""
    after = overrides[place + 1] if place + 1 < len(overrides) else None
    if text.endswith((".yaml", ".yml")):
        return "one config is read, the others by naming them in its `base`"
    if before.endswith("=") and "=" not in text:
        return f"write {before}{text}, without a space"
    if text.startswith("=") and before and "=" not in before:
        return f"write {before}{text}, without a space"
    keys = list_keys()
    name, colon, value = text.partition(":")
    if "=" in text or (key := find_key(name, keys)) is None:
        return "write it as section.key=value"
    if colon and value:
        return f"write {key}={value}"
    if after is not None and after[:1] in ("=", ":"):
        rest = after[1:] or "".join(overrides[place + 2 : place + 3])
        return f"write {key}={rest}, without a space"
    if after is not None and "=" not in after:
        return f"write {key}={after}"
    return f"write it as section.key=value: {key}={_any_value(keys[key])}"


def _as_override(argv: Sequence[str], option: str, keys: dict[str, Key]) -> str | None:
    name, equals, value = option.lstrip("-").partition("=")
    text = RENAMED.get(_flag(name), "") if find_key(name, keys) is None else ""
    if "=" in text and " " not in text and "," not in text:
        return text  # a value of ours: what was given with the flag is in other words
    key = find_key(text or name, keys)
    if key is None:
        return None
    values = [value] if equals else _values_after(argv, option)
    if len(values) > 1 or (keys[key].type.startswith("list of") and values):
        return f"{key}=[{','.join(values)}]"
    return f"{key}={values[0] if values else _any_value(keys[key])}"


def _near_option(option: str, known: Sequence[str]) -> str | None:
    """Which of the `known` options is spelled like `option`, with underscores or a slip in it."""
    name = "--" + _flag(option.lstrip("-").partition("=")[0]).replace("_", "-")
    if name in ("--c", "--cfg", "--conf", "--config-file", "--config-path"):
        return "--config"
    return next(iter(difflib.get_close_matches(name, known, 1, NEAR)), None)


def _advice(option: str, keys: dict[str, Key], program: str) -> str:
    name = _flag(option.lstrip("-").partition("=")[0])
    advice = megatron_advice(name) or suggest(name, keys)
    return advice if not advice.startswith("the sections are") else f"see {program} --help"


def _values_after(argv: Sequence[str], option: str) -> list[str]:
    """Arguments from `option` to the next option or override."""
    values: list[str] = []
    for argument in argv[list(argv).index(option) + 1 :]:
        if _is_option(argument) or "=" in argument or argument.endswith((".yaml", ".yml")):
            break
        values.append(argument)
    return values


def _is_option(argument: str) -> bool:
    """Whether it begins as one does, which a negative number does not."""
    return argument.startswith("-") and argument.lstrip("-")[:1].isalpha()


def _flag(name: str) -> str:
    return name.replace("-", "_").lower()


def _any_value(key: Key) -> str:
    return "true" if key.type.startswith("true | false") else "VALUE"
