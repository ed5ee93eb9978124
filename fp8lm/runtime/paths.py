"""Expands `~` and `$VARIABLE` in paths of a config or a command line."""

from __future__ import annotations

import os
import re

from fp8lm.runtime.errors import InputError

# $NAME, ${NAME}; what else begins with a brace, or a command with a parenthesis, is a shell's.
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*\}?)|(?P<plain>[A-Za-z_]\w*)|(?P<command>\(.*))")


def expand(text: str, what: str) -> str:
    """`text` with a leading `~` and variables of the environment replaced.

    InputError, which begins with `what`, for a user or a variable that there is not.
    """
    text = _VARIABLE.sub(lambda match: _value(match, what), text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise InputError(
            f"{what}: {text!r} begins with the home of a user {user[1:]!r} that this machine does "
            f"not know; write ./{user} for a folder of that name"
        )
    return expanded


def _value(match: re.Match[str], what: str) -> str:
    name = match["plain"] or (match["braced"] or "").removesuffix("}")
    if match[0] not in (f"${name}", f"${{{name}}}") or not name.isidentifier():
        raise InputError(f"{what}: {match[0]!r} is not $NAME or ${{NAME}}")
    value = os.environ.get(name)
    if value is None or not value.strip():
        state = "is not set" if value is None else "is empty"
        raise InputError(f"{what}: the variable {name} of the environment {state}")
    return value
