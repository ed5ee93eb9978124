"""What a case is: a command with something wrong in it, and what the one line must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--config", str(ROOT / "configs" / "gpt_tiny.yaml")]


@dataclass(frozen=True)
class Case:
    """`command` (pretrain_gpt, launch, a tool) with `arguments`; `says` stands in the message.

    `prepare(folder)` makes files first, with the folder as working directory; `environment` is set.
    """

    command: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = [a for a in self.arguments if a not in TINY] or list(self.environment)
        return f"{self.command} {' '.join(shown)}"[:90] or self.says[0][:40]


def train(*overrides, says, **more):
    """pretrain_gpt.py on the tiny config with `overrides`."""
    says = (says,) if isinstance(says, str) else says
    return Case("pretrain_gpt", (*TINY, *overrides), says, **more)


def run(command, *arguments, says, **more):
    """A command of its own."""
    says = (says,) if isinstance(says, str) else says
    return Case(command, arguments, says, **more)


def writes(**files):
    """Make files of this content; double underscores stand for dots, `/` for folders."""

    def prepare(folder):
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare
