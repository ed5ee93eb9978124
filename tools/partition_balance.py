"""How evenly ZeRO deals out the models of the paper: largest share over the mean.

python tools/partition_balance.py

For 7B, 13B and 175B in their tensor- and pipeline-parallel layouts (FP8-LM, arXiv 2310.18313,
Table 4), and 4 to 1024 data-parallel ranks: parameters whose states the fullest rank holds, over
the mean, with whole tensors (Algorithm 1) and with row blocks. No weight is allocated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fp8lm.comm.dims import ParallelDims
from fp8lm.config import load_config
from fp8lm.parallel.distributed_optimizer import PARTITIONS, tensors_of
from fp8lm.parallel.param_layout import BufferEntry, ParamLayout
from fp8lm.planner.layout import plan_stage
from fp8lm.runtime.errors import run_command

MODELS = ("7b", "13b", "175b")
REPLICAS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
VOCABULARY = 50304
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(argv: list[str]) -> None:
    """Print the table."""
    print(f"{'max/mean':16}" + "".join(f"{size:>7}" for size in REPLICAS))
    for model in MODELS:
        tensors = local_tensors(model)
        for name, place in PARTITIONS.items():
            ratios = [balance(place([tensors], size)[0], tensors) for size in REPLICAS]
            print(f"{model:8}{name:8}" + "".join(f"{ratio:7.3f}" for ratio in ratios))


def local_tensors(model: str) -> list[BufferEntry]:
    """What a rank of the first stage holds in preset o3."""
    config = load_config(CONFIGS / f"gpt_{model}.yaml", ["data.mock_data=true"])
    return tensors_of(plan_stage(config, ParallelDims(), VOCABULARY, stage=0).weights)


def balance(layout: ParamLayout, tensors: list[BufferEntry]) -> float:
    """Elements of the fullest rank over the mean."""
    columns = {tensor.name: tensor.columns for tensor in tensors}
    loads = [
        sum((stop - start) * columns[name] for name, (start, stop) in own.items())
        for own in layout.rows
    ]
    return max(loads) * len(loads) / sum(loads)


if __name__ == "__main__":
    sys.exit(run_command(main))
