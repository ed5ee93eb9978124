"""How evenly ZeRO deals out the models of the paper: largest share over the mean.

python tools/partition_balance.py

For 7B, 13B and 175B in their tensor- and pipeline-parallel layouts (FP8-LM, arXiv 2310.18313,
Table 4), and 4 to 1024 data-parallel ranks: parameters whose states the fullest rank holds, over
the mean, with whole tensors (Algorithm 1) and with row blocks. No weight is allocated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fp8lm.config import PrecisionConfig, load_config
from fp8lm.errors import run_command
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.edge import Partition
from fp8lm.layers.recipe import Recipe
from fp8lm.layers.split import Split
from fp8lm.layers.weight import named_weights
from fp8lm.model import GPTModel
from fp8lm.parallel.ownership import Ownership, Tensor2D, row_blocks, whole_tensors
from fp8lm.parallel.replicas import tensors_of

LAYOUTS = {"7b": (1, 1), "13b": (2, 1), "175b": (8, 4)}  # tensor, pipeline
REPLICAS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
VOCABULARY = 50304
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Shard(Partition):
    """The first of `size` tensor-parallel ranks, without a group to talk to."""

    def __init__(self, size: int) -> None:
        self.size = size

    def split(self, dim: int, parts: int = 1) -> Split:
        """See `Partition`."""
        return Split(dim, parts, 0, self.size)


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
    config = load_config(CONFIGS / f"gpt_{model}.yaml", ["data.mock_data=true"]).model
    stage = config.model_copy(update={"num_layers": config.num_layers // pipeline})
    recipe = Recipe.from_config(
        PrecisionConfig(), ReferenceKernels(), torch.device("meta"), Shard(tensor)
    )
    weights = named_weights(GPTModel(stage, VOCABULARY, recipe))
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
