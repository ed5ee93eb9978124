"""The command line that every command with a config shares."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lm.config.help import help_text
from fp8lm.config.loading import load_config
from fp8lm.config.options import explain_options
from fp8lm.config.root import Config
from fp8lm.config.schema import schema_text
from fp8lm.errors import CommandParser, InputError
from fp8lm.output import show


class _Parser(CommandParser):
    """Its help is the table of keys."""

    def format_help(self) -> str:
        return help_text(self.prog)


def parse_command_line(argv: Sequence[str], program: str = "pretrain_gpt.py") -> Config:
    """Read `--config FILE.yaml section.key=value ...`; `--help` prints all keys and exits with 0.

    Raises `InputError` for anything that is not a valid config.
    """
    parser = _Parser(prog=program, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*")
    options, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise InputError(explain_options(argv, unknown, f"{program} --help"))
    if not options.config:
        first = next(iter(options.overrides), "")
        meant = first if first.endswith((".yaml", ".yml")) else "FILE.yaml"
        raise InputError(f"no config: {program} --config {meant}, for one of those in configs/")
    return load_config(options.config, options.overrides)


def main(argv: Sequence[str]) -> int:
    """Print the JSON schema with `--schema`, else the resolved config of a command line."""
    if list(argv) == ["--schema"]:
        show(schema_text().rstrip())
    else:
        show(parse_command_line(argv, "python -m fp8lm.config").to_yaml().rstrip())
    return 0
