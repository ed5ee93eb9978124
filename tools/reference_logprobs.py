"""Compute the log-probabilities of preference training's reference model once, into a file.

python tools/reference_logprobs.py --output reference.safetensors --config configs/X.yaml \\
    train.objective=dpo checkpoint.pretrained=DIR data.data_path=[pairs.jsonl] [overrides]
torchrun --nproc-per-node 8 tools/reference_logprobs.py ...

Give the config and overrides of the training, and start it on as many processes. The training then
reads the file, tuning.reference_logprobs=reference.safetensors, and holds no reference model. It
refuses a file of another model or of other examples.
"""

from __future__ import annotations

import os

from tqdm import tqdm

from fp8lm.arguments import file_to_write, split_overrides
from fp8lm.checkpoint.collectives import on_main
from fp8lm.comm.groups import process_groups, rank_device
from fp8lm.config import Config, load_config
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser, InputError
from fp8lm.runtime.launchers import adopt_launcher
from fp8lm.training.build import build
from fp8lm.training.builders import resolve_device
from fp8lm.training.hooks import build_trainer
from fp8lm.training.log_probs import compute_log_probs


def main(argv: list[str]) -> int:
    """Load the reference, read all examples, write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=file_to_write, required=True, help="the file to write")
    argv, overrides = split_overrides(argv)
    options = parser.parse_args(argv)
    config = without_folders(load_config(options.config, overrides))
    adopt_launcher(os.environ)
    device = rank_device(resolve_device(config.train.device))
    with process_groups(device, config.parallel) as groups:
        trainer = build_trainer(build(config, groups, device))
        trainer.load()
        with tqdm(unit="sample", disable=None if groups.is_main else True) as bar:
            found = compute_log_probs(trainer, bar.update)
        on_main(groups.world, lambda: found.write(options.output))
        if groups.is_main:
            counts = ", ".join(f"{name} {len(x):,}" for name, x in found.losses.items())
            print(f"{options.output}: log-probabilities of tokens: {counts}")
    return 0


def without_folders(config: Config) -> Config:
    """A run that saves nothing and goes on from nothing; `InputError` unless it has a reference."""
    if config.train.objective != "dpo":
        raise InputError(
            f"train.objective = {config.train.objective} has no reference model: write "
            "train.objective=dpo"
        )
    checkpoint = config.checkpoint.model_copy(update={"save": None, "load": None})
    tuning = config.tuning.model_copy(update={"reference_logprobs": None})
    return config.model_copy(update={"checkpoint": checkpoint, "tuning": tuning})


if __name__ == "__main__":
    exit_with(main)
