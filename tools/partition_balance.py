"""How evenly ZeRO deals out the models of the paper: largest share over the mean.

python tools/partition_balance.py

For 7B, 13B and 175B in their tensor- and pipeline-parallel layouts (FP8-LM, arXiv 2310.18313,
Table 4), and 4 to 1024 data-parallel ranks: parameters whose states the fullest rank holds, over
the mean, with whole tensors (Algorithm 1) and with row blocks. No weight is allocated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fp8lm.config import load_config
from fp8lm.errors import run_command
from fp8lm.inspect.layout import stage_weights
from fp8lm.parallel.ownership import Ownership, Tensor2D, row_blocks, whole_tensors
from fp8lm.parallel.replicas import tensors_of

LAYOUTS = {"7b": (1, 1), "13b": (2, 1), "175b": (8, 4)}  # tensor, pipeline
REPLICAS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
VOCABULARY = 50304
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(argv: list[str]) -> None:
    """Print the table."""
    print(f"{'max/mean':16}" + "".join(f"{size:>7}" for size in REPLICAS))
    for model in LAYOUTS:
        tensors, columns = local_tensors(model)
        for name, place in (("tensor", whole_tensors), ("even", row_blocks)):
            ratios = [balance(place(tensors, size), columns) for size in REPLICAS]
            print(f"{model:8}{name:8}" + "".join(f"{ratio:7.3f}" for ratio in ratios))


def local_tensors(model: str) -> tuple[list[Tensor2D], dict[str, int]]:
    """What a rank of the first stage holds in preset o3, and elements per row."""
    tensor, pipeline = LAYOUTS[model]
    keys = {"tensor": tensor, "pipeline": pipeline}
    overrides = [f"parallel.{kind}_model_parallel_size={size}" for kind, size in keys.items()]
    config = load_config(
        CONFIGS / f"gpt_{model}.yaml", [*overrides, "parallel.sequence_parallel=false"]
    )
    weights = stage_weights(config, VOCABULARY, 0)
    columns = {
        name: weight.spec.numel // weight.spec.local_shape[0] for name, weight in weights.items()
    }
    return tensors_of(weights), columns


def balance(ownership: Ownership, columns: dict[str, int]) -> float:
    """Elements of the fullest rank over the mean."""
    loads = ownership.load(columns)
    return max(loads) * len(loads) / sum(loads)


if __name__ == "__main__":
    sys.exit(run_command(main))
