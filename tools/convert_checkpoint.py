"""Take a model away, or bring one in.

python tools/convert_checkpoint.py --from fp8lm --to hf     --input runs/x/checkpoints --output x
python tools/convert_checkpoint.py --from fp8lm --to hf-fp8 --input runs/x/checkpoints --output x
python tools/convert_checkpoint.py --from hf    --to fp8lm  --input Qwen3-0.6B --output runs/qwen3
python tools/convert_checkpoint.py --from fp8lm --to megatron --input runs/x/checkpoints --output x
python tools/convert_checkpoint.py --from megatron --to fp8lm --input x --output y --config C.yaml

hf is a HuggingFace folder: safetensors, config.json, tokenizer. hf-fp8 is one of compressed-tensors
that vLLM serves: FP8 weights and scales as they were trained. megatron is megatron-core's
torch_dist, the weights of one; its older state dicts (torch.save), with FP8 weights of
TransformerEngine or MS-AMP, are read, too. A model that comes in is a checkpoint without optimizer
states: train it on with checkpoint.pretrained=OUTPUT. One block of rows at a time is in memory.
OUTPUT is not there until all of it is; the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

import fp8lm
from fp8lm.arguments import as_path, number_type, path_text
from fp8lm.checkpoint import Checkpoint, open_checkpoint
from fp8lm.checkpoint.checksums import CHECKSUMS, file_digest
from fp8lm.config import load_config
from fp8lm.convert import megatron, megatron_torch
from fp8lm.convert.hf_export import DTYPES, export_model, plan_export
from fp8lm.convert.hf_import import plan_import
from fp8lm.convert.output import check_output, identity_of_files
from fp8lm.convert.release import import_model
from fp8lm.convert.weights import Weights
from fp8lm.data.tokenizer import TOKENIZER_TYPES
from fp8lm.runtime.allocator import return_large_blocks
from fp8lm.runtime.errors import CommandParser, run_command

GIGA = 10**9
EXPORTS, IMPORTS = ("hf", "hf-fp8", "megatron"), ("hf", "megatron")
PAIRS = {*(("fp8lm", name) for name in EXPORTS), *((name, "fp8lm") for name in IMPORTS)}


def main(argv: list[str]) -> None:
    """Convert, and say what was made of what."""
    options = parse(argv)
    return_large_blocks()
    check_output(options.output)
    if options.source == "fp8lm":
        export(options)
    else:
        bring_in(options)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `InputError` for options that do not go together."""
    lines = __doc__.splitlines()
    parser = CommandParser(
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="source", choices=("fp8lm", *IMPORTS), required=True)
    add("--to", dest="target", choices=("fp8lm", *EXPORTS), required=True)
    add("--input", type=as_path, required=True, help="a folder of checkpoints, one, or a model")
    add("--output", type=as_path, required=True, help="a folder that is not there yet")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the weights; default: bf16, or the model's own",
    )
    add(
        "--max-shard-size",
        type=number_type(1),
        default=5,
        metavar="GB",
        help="of a safetensors file (default: 5)",
    )
    add("--config", help="of the model and tokenizer that --from megatron brings in (YAML)")
    add("--weights-only", action="store_true", help="leave optimizer states out (megatron)")
    add("--tokenizer-model", type=path_text, help="not the model's own: a file or folder")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, help="its kind")
    options = parser.parse_args(argv)
    if (options.source, options.target) not in PAIRS:
        parser.error(f"--from {options.source} --to {options.target} is no conversion")
    if options.target == "hf-fp8" and options.dtype is not None:
        parser.error("--dtype: hf-fp8 has the formats of the training")
    if (options.source == "megatron") != (options.config is not None):
        parser.error("--config FILE: --from megatron needs it, and nothing else takes it")
    if options.weights_only and "megatron" not in (options.source, options.target):
        parser.error("--weights-only: hf has no optimizer states")
    if options.source != "hf" and (options.tokenizer_model or options.tokenizer_type):
        parser.error("--tokenizer-model: for --from hf; others say themselves what theirs is")
    if options.tokenizer_type and not options.tokenizer_model:
        parser.error("--tokenizer-type says of which kind --tokenizer-model is: give that, too")
    return options


def export(options: argparse.Namespace) -> None:
    """Write a checkpoint of this program as a HuggingFace folder."""
    checkpoint = open_checkpoint(options.input, needed=("config", "config.model"))
    for problem in checkpoint.passed_over:
        print(f"warning: passed over {problem}", file=sys.stderr)
    if options.target == "megatron":
        export_to_megatron(options, checkpoint)
        return
    dtype = None if options.target == "hf-fp8" else options.dtype or "bf16"
    plan = plan_export(checkpoint, dtype)
    tell([f"{checkpoint.folder}, iteration {checkpoint.iteration}", *plan.lines])
    total = sum(tensor.nbytes for tensor in plan.tensors)
    with progress_bar(total) as bar:
        largest = options.max_shard_size * GIGA
        conversion = describe(options, identity_of(checkpoint))
        export_model(plan, options.output, largest, conversion, lambda size: bar.update(size))
    print(f"{options.output}: {total:,} bytes of weights")


def export_to_megatron(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Write the weights of a checkpoint of this program as one of megatron-core."""
    weights, dtype = Weights.of(checkpoint), options.dtype or "bf16"
    plan = megatron.plan_export(weights, dtype, weights_only=options.weights_only)
    tell([f"{checkpoint.folder}, iteration {checkpoint.iteration}", *plan.lines])
    conversion = describe(options, identity_of(checkpoint))
    with progress_bar(plan.nbytes) as bar:
        megatron.export_model(
            plan, weights, options.output, conversion, lambda size: bar.update(size)
        )
    print(f"{options.output}: {plan.nbytes:,} bytes")


def bring_in(options: argparse.Namespace) -> None:
    """Write a model of another program as a checkpoint of this one."""
    if options.source == "megatron":
        config = load_config(options.config)
        if (file := megatron_torch.find_file(options.input)) is not None:
            plan = megatron_torch.plan_import(file, config, options.dtype)
        else:
            kept = options.weights_only
            plan = megatron.plan_import(options.input, config, options.dtype, weights_only=kept)
    else:
        tokenizer = options.tokenizer_model, options.tokenizer_type
        plan = plan_import(options.input, options.dtype, *tokenizer)
    tell([str(options.input), *plan.lines])
    with progress_bar(plan.nbytes) as bar:
        source = {"source": identity_of_files(options.input)}
        conversion = describe(options, source)
        import_model(plan, options.output, conversion, lambda size: bar.update(size))
    key = "start from it with checkpoint.pretrained"
    if plan.training is not None:
        key = f"go on from iteration {plan.iteration} with checkpoint.load"
    print(f"{options.output}: {key}={options.output}")


def describe(options: argparse.Namespace, source: dict[str, Any]) -> dict[str, Any]:
    """What tells one conversion from another."""
    given = {key: str(value) for key, value in sorted(vars(options).items())}
    return {**given, "input": str(options.input.resolve()), "version": fp8lm.__version__, **source}


def identity_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Of a checkpoint's content: its digests' digest."""
    folder: Path = checkpoint.folder
    return {"source": file_digest(folder / CHECKSUMS)}


def progress_bar(total: int) -> tqdm:
    """Of bytes, on standard error; none where that is no terminal."""
    return tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)


def tell(lines: list[str]) -> None:
    """Print lines, those after the first indented."""
    print("\n  ".join(lines))


if __name__ == "__main__":
    sys.exit(run_command(main))
