"""Time and memory of conversions, on a checkpoint of the shape of a config, of random bytes.

python tools/bench_convert.py --config configs/llama_8b.yaml [--folder DIR] [--output FILE.json]
    [section.key=value ...]

Makes a release in the config's precision, and converts it to hf-fp8 (if its weights are FP8), back,
and to BF16, each in a process of its own: seconds, the most memory that it had (resident, at any
time), and bytes written per second beside what a plain copy of the checkpoint's files reaches on
this disk. Removes what it has made; needs room for three bytes per parameter.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from fp8lm.arguments import file_to_write, folder_to_write, split_overrides
from fp8lm.config import Config, load_config
from fp8lm.convert.names import param_shapes
from fp8lm.convert.release import Import, Incoming, write_model
from fp8lm.data.files import write_aside
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.numerics import BF16, FP32, Format, format_by_name
from fp8lm.runtime.errors import CommandParser, InputError, RunFailed, run_command
from fp8lm.training.builders import model_vocab_size

TOOL = Path(__file__).with_name("convert_checkpoint.py")
RANDOM_BYTES = 2**26
INTERVAL = 0.25  # seconds between two looks at a process's memory
COPIED = 2**32  # bytes of the plain copy at most
_FINITE = 0xB7  # clears a bit of the exponent in every byte: neither NaN nor Inf in any format


def main(argv: list[str]) -> None:
    """Make, convert, measure, report."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", type=folder_to_write, default=Path("runs/bench_convert"))
    parser.add_argument("--output", type=file_to_write, help="JSON")
    arguments, overrides = split_overrides(argv)
    options = parser.parse_args(arguments)
    config = load_config(options.config, overrides)
    if options.folder.exists():
        raise InputError(f"--folder {options.folder} is there already: name one that is not")
    try:
        result = measure(config, options.folder)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    if options.output:
        write_aside(options.output, (json.dumps(result, indent=1) + "\n").encode())


def measure(config: Config, folder: Path) -> dict[str, Any]:
    """The numbers of all conversions, printed as they come."""
    params = random_params(config)
    parameters = sum(torch.Size(param.shape).numel() for param in params.values())
    tokenizer = build_tokenizer(config.tokenizer)
    model = Import({}, {}, tokenizer, params, [])
    write_model(folder / "ck", config, model, lambda size: None)
    result: dict[str, Any] = {
        "parameters": parameters,
        "processors": os.cpu_count(),
        "precision": config.precision.preset,
        "conversions": {},
    }
    result["copy"] = show("copy", measure_copy(folder))
    steps = [("hf", "ck", "bf16")]
    if config.precision.params_dtype == "fp8_e4m3":
        steps = [("hf-fp8", "ck", "fp8"), ("fp8lm", "fp8", "back"), *steps]
    for target, source, output in steps:
        kind = "hf" if target == "fp8lm" else "fp8lm"
        name = f"{kind} to {target}"
        numbers = convert(kind, target, folder / source, folder / output)
        result["conversions"][name] = show(name, numbers)
        if source != "ck":
            shutil.rmtree(folder / source)
            shutil.rmtree(folder / output)
    return result


def random_params(config: Config) -> dict[str, Incoming]:
    """Weights in the formats of `config`, all cut from the same random bytes."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 256, (RANDOM_BYTES,), dtype=torch.uint8, generator=generator) & _FINITE
    high = FP32 if config.precision.gemm == "fp32" else BF16
    matrix = format_by_name(config.precision.params_dtype)
    rows = model_vocab_size(config, build_tokenizer(config.tokenizer).vocab_size)
    found = {}
    for name, shape in param_shapes(config.model, rows).items():
        is_matrix = ".linear_" in name and len(shape) == 2
        fmt = matrix if is_matrix else high
        scale = torch.tensor(1024.0) if fmt.scaled else None
        sections = 2 if config.model.swiglu and ".linear_fc1." in name else None
        found[name] = Incoming(shape, fmt, reader(pool, shape, fmt), scale, sections)
    return found


def reader(pool: Tensor, shape: tuple[int, ...], fmt: Format) -> Callable[[int, int], Tensor]:
    """Rows of a random tensor."""

    def read(start: int, stop: int) -> Tensor:
        rows = (stop - start, *shape[1:])
        size = torch.Size(rows).numel() * fmt.bytes
        repeated = pool.repeat(-(-size // len(pool)))[:size]
        return repeated.view(fmt.dtype).view(rows)

    return read


def convert(source: str, target: str, folder: Path, output: Path) -> dict[str, float]:
    """Seconds, most memory and bytes per second of one conversion in a process of its own."""
    argv = [sys.executable, str(TOOL), "--from", source, "--to", target]
    argv += ["--input", str(folder), "--output", str(output)]
    start = time.perf_counter()
    # What the kernel reports of a child at its end begins with the memory of its parent.
    process, resident = psutil.Popen(argv), 0
    while (code := process.poll()) is None:
        with suppress(psutil.Error):
            resident = max(resident, process.memory_info().rss)
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if code:
        raise RunFailed(f"{' '.join(argv[1:])} ended with {code}")
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return numbers_of(seconds, written) | {"most resident bytes": resident}


def measure_copy(folder: Path) -> dict[str, float]:
    """A plain copy of the checkpoint's files, one after the other, synced."""
    paths = sorted((folder / "ck").glob("iter_*/*.distcp"))
    start, written = time.perf_counter(), 0
    with (folder / "copy").open("wb") as target:
        for path in paths:
            with path.open("rb") as source:
                while written < COPIED and (data := source.read(RANDOM_BYTES)):
                    written += target.write(data)
        target.flush()
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    (folder / "copy").unlink()
    return numbers_of(seconds, written)


def numbers_of(seconds: float, written: int) -> dict[str, float]:
    """What is reported of something that took `seconds` and wrote so many bytes."""
    load = os.getloadavg()[0]  # of the last minute
    return {
        "seconds": seconds,
        "bytes": written,
        "bytes per second": written / seconds,
        "load average": load,
    }


def show(name: str, numbers: dict[str, float]) -> dict[str, float]:
    """Print a line, and return the numbers."""
    memory = numbers.get("most resident bytes")
    line = f"{name:16} {numbers['seconds']:8.1f} s  {numbers['bytes per second'] / 1e6:7.0f} MB/s"
    line += f"  load {numbers['load average']:4.1f}"
    print(line + (f"  {memory / 1e9:5.2f} GB resident" if memory else ""), flush=True)
    return numbers


if __name__ == "__main__":
    sys.exit(run_command(main))
