"""Compiles what operations launch, for a Hopper GPU, on a machine that has none.

    python -m tests.kernels.triton.ahead_of_time < cases.txt     a case a line, as module:function

A case is a function without arguments that runs operations on uninitialized CPU tensors. Triton
then compiles every kernel for them as it would in training, and launches none: the facts of the
machine code are printed as JSON. In a process of its own, as tests run kernels in the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile

ROOT = Path(__file__).parents[3]
INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z]\w*\.[\w.:]+)", re.MULTILINE)
SASS_MEMORY = re.compile(r"\b((?:LDG|STG|LDL|STL|RED|ATOMG)[\w.]*)")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel: registers of a thread, bytes on its stack, instructions.

    `ptx` and `sass` count instructions, of the latter those that access memory; `warps` are a
    program's.
    """

    name: str
    registers: int
    stack: int
    warps: int
    ptx: dict[str, int]
    sass: dict[str, int]

    def count(self, pattern: str) -> int:
        """Number of instructions, PTX and SASS, whose name the regular expression begins."""
        every = (*self.ptx.items(), *self.sass.items())
        return sum(count for name, count in every if re.match(pattern, name))


def compile_cases(cases: list[str], cache: Path) -> dict[str, list[Compiled]]:
    """The kernels that each case (`module:function`) launches, in order, each of them once."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.triton.ahead_of_time"]
    done = subprocess.run(
        command, input="\n".join(cases), env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    facts = json.loads(done.stdout.splitlines()[-1])
    return {case: [Compiled(**kernel) for kernel in kernels] for case, kernels in facts.items()}


class _Compiler:
    """Triton's driver, as much of it as compiling needs, and what was compiled since `take`."""

    def __init__(self):
        self._compiled = []

    def take(self):
        taken, self._compiled = self._compiled, []
        return list({id(kernel): kernel for kernel in taken}.values())

    def install(self):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        class Driver:
            def get_current_target(self):
                return GPUTarget("cuda", 90, 32)

            def get_current_device(self):
                return 0

            def get_current_stream(self, device):
                return 0

        triton.runtime.driver.set_active(Driver())
        run = JITFunction.run

        def compile_only(kernel, *args, **options):
            self._compiled.append(run(kernel, *args, **{**options, "warmup": True}))

        JITFunction.run = compile_only


def _facts(kernel):
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = [tools / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack, _, local = map(int, RESOURCES.search(text).groups())
    return Compiled(
        kernel.metadata.name,
        registers,
        stack + local,
        kernel.metadata.num_warps,
        dict(Counter(INSTRUCTION.findall(kernel.asm["ptx"]))),
        dict(Counter(SASS_MEMORY.findall(text))),
    )


def main():
    """Compile the cases named on stdin."""
    compiler, facts = _Compiler(), {}
    compiler.install()
    for case in sys.stdin.read().split():
        module, name = case.split(":")
        getattr(import_module(module), name)()
        facts[case] = [asdict(_facts(kernel)) for kernel in compiler.take()]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
