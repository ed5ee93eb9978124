"""FP8-LM's Tables 5 and 7, its tuning, and published FP8 speed-ups, beside what the planner says.

python tools/paper_tables.py [--json docs/benchmarks/paper_tables.json]

The models are those of configs/ with the head's own matrix (`untie_embeddings_and_output_weights`),
which is how the paper's volumes of weights come out. Its GB are 2^30 bytes. The memory is that of
the fullest rank without the buffers of this project's all-to-all reduction, which the paper sums in
place. BF16 is `bf16`; TE is `te` with the FP8 copies of weights that TransformerEngine keeps,
two bytes per parameter; FP8 is `o3` with one, and fp32 gradients of the embeddings on the wire.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fp8lm.arguments import file_to_write
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.data.tokenizer import build_tokenizer
from fp8lm.planner.describe import aligned
from fp8lm.planner.estimate import Estimate, estimate
from fp8lm.planner.layout import plan_layout
from fp8lm.planner.tracing.costs import FURTHER
from fp8lm.planner.tracing.roofline import Hardware
from fp8lm.runtime.errors import CommandParser, run_command

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2.0**30
CACHED = "precision.cache_weight_operands=true"
PRECISIONS = {
    "BF16": ("precision.preset=bf16",),
    "TE": ("precision.preset=te", CACHED),
    "FP8": ("precision.preset=o3", CACHED, "precision.wire.grads=fp32"),
}
UNTIED = "model.untie_embeddings_and_output_weights=true"


@dataclass(frozen=True)
class Row:
    """A row of the paper's Table 5: GB of memory, samples a second, GB of weights on the wires."""

    model: str
    gpus: int
    micro_batch: int
    precision: str
    memory: float
    samples: float
    weights: float


PAPER = [
    Row("7b", 32, 2, "BF16", 69.6, 159.2, 37.2),
    Row("7b", 32, 2, "TE", 77.3, 224.5, 37.2),
    Row("7b", 32, 2, "FP8", 49.4, 219.8, 13.9),
    Row("7b", 32, 4, "FP8", 69.3, 230.5, 13.9),
    Row("13b", 32, 2, "BF16", 68.2, 79.3, 34.3),
    Row("13b", 32, 2, "TE", 76.4, 111.7, 34.3),
    Row("13b", 32, 2, "FP8", 48.9, 109.5, 12.4),
    Row("13b", 32, 4, "FP8", 67.8, 121.5, 12.4),
    Row("175b", 128, 1, "BF16", 66.1, 22.4, 23.4),
    Row("175b", 128, 1, "TE", 69.6, 28.7, 23.4),
    Row("175b", 128, 1, "FP8", 40.3, 27.1, 8.2),
    Row("175b", 128, 4, "FP8", 57.7, 39.3, 8.2),
]
# Table 7: GB of activations that a rank sends for a micro-batch, in BF16 and in FP8. The numbers
# are those of six gathers a layer, of which the gradients' two are in BF16 both times.
ACTIVATIONS = {"13b": (4.7, 3.1), "175b": (5.9, 3.9)}
GRADIENTS_OF_GATHERS = 1 / 3


@dataclass(frozen=True)
class SpeedUp:
    """Step times in BF16 and FP8 that NVIDIA/dgxc-benchmarking (v25.04.02) publishes for H100."""

    name: str
    config: str
    gpus: int
    bf16: float
    fp8: float
    overrides: Sequence[str]


def _nemotron(layers: int, hidden: int, heads: int, batch: int, tp: int, pp: int) -> list[str]:
    """Without gates, with eight query groups and a vocabulary of 256,000."""
    return [
        f"model.num_layers={layers}",
        f"model.hidden_size={hidden}",
        f"model.num_attention_heads={heads}",
        "model.num_query_groups=8",
        "model.seq_length=4096",
        "model.disable_bias_linear=true",
        "tokenizer.vocab_size=255999",
        f"parallel.tensor_model_parallel_size={tp}",
        "parallel.sequence_parallel=true",
        f"parallel.pipeline_model_parallel_size={pp}",
        f"train.micro_batch_size={batch}",
        "train.global_batch_size=64",
        UNTIED,
    ]


def _llama_405b(layers: int, pp: int, batch: int) -> list[str]:
    """With embedding and head counted as a layer each, as NeMo fills its pipeline."""
    return [
        f"model.num_layers={layers}",
        "model.hidden_size=16384",
        "model.ffn_hidden_size=53248",
        "model.num_attention_heads=128",
        f"parallel.pipeline_model_parallel_size={pp}",
        "parallel.num_layers_per_virtual_pipeline_stage=2",
        f"train.global_batch_size={batch}",
    ]


# Changes by FP8 in percent that the paper reports of instruction tuning (a 7B model: memory of a
# GPU, throughput) and of RLHF by PPO (weights, optimizer states).
SFT_PAPER = {"GB": -14.0, "samples/s": 27.0}
RLHF_PAPER = {"weights with masters": -32.0, "moments": -62.0}
TRAINED, FROZEN = 2, 2  # actor and critic; reference and reward model
_ALONE = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
PUBLISHED = [
    SpeedUp("Llama 3.1 8B", "llama_8b", 8, 12.27, 9.33, [*_ALONE, "train.global_batch_size=128"]),
    SpeedUp("Nemotron-4 15B", "gpt_7b", 16, 2.66, 1.98, _nemotron(32, 6144, 48, 2, 2, 1)),
    SpeedUp("Nemotron-4 340B", "gpt_7b", 256, 4.36, 2.93, _nemotron(96, 18432, 96, 1, 8, 8)),
    SpeedUp("Llama 3.1 405B", "llama_70b", 512, 19.78, 12.37, _llama_405b(128, 8, 256)),
    SpeedUp("405B of 62 layers", "llama_70b", 128, 19.62, 12.18, _llama_405b(64, 4, 64)),
]


def main(argv: list[str]) -> None:
    """Estimate all rows, print the tables, write the numbers."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=file_to_write, help="write the numbers to this file")
    options = parser.parse_args(argv)
    hardware = Hardware.find("h100")
    rows = [table5(row, hardware) for row in tqdm(PAPER, desc="Table 5", disable=None)]
    volumes = [table7(model, hardware) for model in tqdm(ACTIVATIONS, desc="Table 7", disable=None)]
    ratios = [speed_up(each, hardware) for each in tqdm(PUBLISHED, desc="speed-ups", disable=None)]
    tuned = {"sft": sft(hardware), "dpo": dpo(), "rlhf": rlhf()}
    for title, facts in (
        *(("Table 5", rows), ("Table 7", volumes), ("Speed-ups", ratios)),
        *((f"Tuning, {name}", facts) for name, facts in tuned.items()),
    ):
        print(f"{title}\n{as_table(facts)}\n")
    if options.json:
        shown = {"table5": rows, "table7": volumes, "speed_ups": ratios, "tuning": tuned}
        write_aside(options.json, json.dumps(shown, indent=1) + "\n")


def estimated(config: str, gpus: int, overrides: Sequence[str], hardware: Hardware) -> Estimate:
    """The estimate of a file of configs/."""
    read = load_config(CONFIGS / f"{config}.yaml", list(overrides))
    num_ids = build_tokenizer(read.tokenizer).vocab_size
    layout = plan_layout(read, num_ids, gpus, min(gpus, hardware.gpus_per_node))
    return estimate(layout, num_ids, hardware)


def table5(row: Row, hardware: Hardware) -> dict[str, object]:
    """A row with what the planner says, and how far that is off in percent."""
    micro_batch = f"train.micro_batch_size={row.micro_batch}"
    overrides = [*PRECISIONS[row.precision], UNTIED, micro_batch]
    planned = estimated(f"gpt_{row.model}", row.gpus, overrides, hardware)
    held = [rank for stage in planned.memory for rank in stage]
    memory = [(rank.total - rank.components["communication"]) / GIB for rank in held]
    sent = max(
        sum(sent[wire] for wire in ("grads", "params")) for stage in planned.wires for sent in stage
    )
    samples = planned.batches.global_batch_size / planned.time.total
    return {
        "model": row.model,
        "precision": row.precision,
        "micro-batch": row.micro_batch,
        "GB, paper": row.memory,
        "GB, least": min(memory),
        "GB, most": max(memory),
        "off, %": off(max(memory), row.memory),
        "weights, paper": row.weights,
        "weights": sent / GIB,
        "weights off, %": off(sent / GIB, row.weights),
        "samples/s, paper": row.samples,
        "samples/s": samples,
    }


def table7(model: str, hardware: Hardware) -> dict[str, object]:
    """Gathers of a micro-batch on a stage, with inputs in FP8 and gradients in BF16."""
    config, gpus = f"gpt_{model}", next(row.gpus for row in PAPER if row.model == model)
    gathered = {}
    for precision in ("BF16", "FP8"):
        planned = estimated(config, gpus, [*PRECISIONS[precision], UNTIED], hardware)
        layers = len(planned.layout.stages[0].chunks[0].layers)
        wires = planned.traced.layer.wires.by_purpose(FURTHER)
        gathered[precision] = layers * wires["tp_gather"].sent / GIB
    bf16, all_fp8 = gathered["BF16"], gathered["FP8"]
    inputs_fp8 = all_fp8 + GRADIENTS_OF_GATHERS * (bf16 - all_fp8)
    paper = ACTIVATIONS[model]
    return {
        "model": model,
        "BF16, paper": paper[0],
        "BF16": bf16,
        "BF16 off, %": off(bf16, paper[0]),
        "FP8, paper": paper[1],
        "FP8, inputs only": inputs_fp8,
        "FP8 off, %": off(inputs_fp8, paper[1]),
        "FP8 here": all_fp8,
    }


def speed_up(published: SpeedUp, hardware: Hardware) -> dict[str, object]:
    """FP8 over BF16, both with the same layout."""
    times = {}
    for precision in ("BF16", "TE"):
        overrides = [*PRECISIONS[precision], *published.overrides]
        planned = estimated(published.config, published.gpus, overrides, hardware)
        times[precision] = planned.time.total
    ratio, predicted = published.bf16 / published.fp8, times["BF16"] / times["TE"]
    return {
        "model": published.name,
        "GPUs": published.gpus,
        "BF16, s": times["BF16"],
        "FP8, s": times["TE"],
        "published": ratio,
        "predicted": predicted,
        "off, %": off(predicted, ratio),
    }


def sft(hardware: Hardware) -> list[dict[str, object]]:
    """Memory of the fullest of 8 GPUs and samples per second of tuning a 7B model."""
    found: dict[str, dict[str, float]] = {}
    for precision in ("BF16", "FP8"):
        overrides = [*PRECISIONS[precision], "train.objective=sft", "train.global_batch_size=128"]
        planned = estimated("gpt_7b", 8, [*_ALONE, *overrides], hardware)
        samples = planned.batches.global_batch_size / planned.time.total
        found[precision] = {"GB": planned.fullest.total / GIB, "samples/s": samples}
    return [changed(key, *_of(key, found), SFT_PAPER[key]) for key in SFT_PAPER]


def dpo() -> list[dict[str, object]]:
    """Bytes per parameter of a 7B model that is trained on preferences, on one rank."""
    found = {precision: state_7b(precision) for precision in ("BF16", "FP8")}
    return [changed(key, *_of(key, found)) for key in found["BF16"]]


def rlhf() -> list[dict[str, object]]:
    """Bytes per parameter of PPO: actor and critic, frozen reference and reward, all of one size.

    No such training is here; what each model would hold is what a run and its reference hold.
    """
    found: dict[str, dict[str, float]] = {}
    for precision in ("BF16", "FP8"):
        one = state_7b(precision)
        weights = TRAINED * one["weights"] + FROZEN * one["reference"]
        found[precision] = {
            "weights": weights,
            "weights with masters": weights + TRAINED * one["master"],
            "gradients": TRAINED * one["grads"],
            "moments": TRAINED * one["moments"],
        }
        kinds = ("weights with masters", "gradients", "moments")
        found[precision]["all"] = sum(found[precision][kind] for kind in kinds)
    return [changed(key, *_of(key, found), RLHF_PAPER.get(key)) for key in found["BF16"]]


def state_7b(precision: str) -> dict[str, float]:
    """Bytes per parameter by kind, with a reference model."""
    overrides = [*_ALONE, *PRECISIONS[precision], "train.objective=dpo"]
    overrides.append("precision.cache_weight_operands=false")
    config = load_config(CONFIGS / "gpt_7b.yaml", overrides)
    layout = plan_layout(config, build_tokenizer(config.tokenizer).vocab_size, 1, 1)
    (kinds,) = layout.stages[0].state
    count = layout.num_parameters
    moments = kinds["exp_avg"] + kinds["exp_avg_sq"]
    found = {kind: kinds[kind] / count for kind in ("weights", "grads", "master")}
    found |= {"moments": moments / count, "reference": kinds["reference"] / count}
    return found | {"all": sum(found.values())}


def _of(key: str, found: dict[str, dict[str, float]]) -> tuple[float, float]:
    return found["BF16"][key], found["FP8"][key]


def changed(key: str, bf16: float, fp8: float, paper: float | None = None) -> dict[str, object]:
    """A row: both, the change in percent, and the paper's."""
    reported = "" if paper is None else paper
    return {"": key, "BF16": bf16, "FP8": fp8, "change, %": off(fp8, bf16), "paper, %": reported}


def off(found: float, expected: float) -> float:
    """Difference in percent."""
    return 100 * (found / expected - 1)


def as_table(facts: Sequence[dict[str, object]]) -> str:
    """A row each."""
    cells = [
        [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in facts
    ]
    return "\n".join(aligned([list(facts[0]), *cells], left={0}))


if __name__ == "__main__":
    sys.exit(run_command(main))
