"""The command line that every command with a config shares."""

from __future__ import annotations

from collections.abc import Sequence

from fp8lm.config.generated import help_text, reference_text, schema_text
from fp8lm.config.loading import load_config
from fp8lm.config.options import explain_options
from fp8lm.config.root import Config
from fp8lm.runtime.errors import CommandParser, InputError
from fp8lm.runtime.output import show


class _Parser(CommandParser):
    """Its help is the table of keys."""

    def format_help(self) -> str:
        return help_text(self.prog)


def parse_command_line(argv: Sequence[str], program: str = "pretrain_gpt.py") -> Config:
    """Read `[--config] FILE.yaml section.key=value ...`; `--help` prints all keys and exits with 0.

    Raises `InputError` for anything that is not a valid config.
    """
    parser = _Parser(prog=program, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*")
    options, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        raise InputError(explain_options(argv, unknown, parser))
    config, overrides = config_and_overrides(options.config, options.overrides)
    if not config:  # an empty argument is a shell's variable that is not set
        raise InputError(f"no config: {program} --config FILE.yaml, for one of those in configs/")
    return load_config(config, overrides)


def config_and_overrides(
    config: str | None, arguments: Sequence[str]
) -> tuple[str | None, list[str]]:
    """The file of the config, which may also be the first of `arguments`, and the overrides."""
    if config is None and arguments and "=" not in arguments[0]:
        return arguments[0], list(arguments[1:])
    return config, list(arguments)


def main(argv: Sequence[str]) -> int:
    """Print the resolved config of a command line.

    `--schema` alone prints the JSON schema, `--reference` alone the page docs/reference/config.md.
    """
    written = {"--schema": schema_text, "--reference": reference_text}
    if len(argv) == 1 and argv[0] in written:
        show(written[argv[0]]().rstrip())
    else:
        show(parse_command_line(argv, "python -m fp8lm.config").to_yaml().rstrip())
    return 0
