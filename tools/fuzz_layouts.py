"""Random layouts against one process: do parallel forms, formats and interruptions compose?

python tools/fuzz_layouts.py --runs 200 --seed 1 [--only NUMBER ...] [--max-processes 8]

A case draws a tiny model, a precision, a batch schedule and one to three phases, each with a layout
of its own: the run is stopped after a phase and goes on from its checkpoint under the next layout.
Three runs of it are compared:

one process    no layout, no interruption: the losses agree within the bound of the precision
               (BOUNDS; in fp32 only sums are taken in another order)
disturbed      the phases, killed at a random moment, with asynchronous checkpoints and with other
               values of the keys that must not matter (NEUTRAL)
undisturbed    the same phases: every report and every byte of the last checkpoint are equal to
               those of the disturbed run

Prints one line for each case. Exit code 1 if one fails, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from forked_jobs import JobServer, Kill

from fp8lm.arguments import folder_to_write
from fp8lm.checkpoint import open_checkpoint
from fp8lm.checkpoint.reader import differences
from fp8lm.runtime.errors import CommandParser, run_command

ROOT = Path(__file__).resolve().parents[1]
Overrides = dict[str, Any]

FIXED = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.seq_length": 32,
    "train.eval_iters": 1,
    "train.num_threads": 1,
    "optimizer.lr": 5e-3,
    "logging.log_interval": 1,
    "logging.tensorboard": "false",
}
# Where FIXED's rate is too high: at width 256 the loss jumps by 1.5 in a step in BF16 as well, and
# that of IPO, a square that begins at 25, has doubled in a step of one process.
STEADY_LR = 1e-3
# No attention dropout: every rank draws masks of its own, so that layouts differ in them.
MODELS = {
    "model.swiglu": ("true", "false"),
    "model.normalization": ("RMSNorm", "LayerNorm"),
    "model.disable_bias_linear": ("true", "false"),
    "model.untie_embeddings_and_output_weights": ("true", "false"),
    "model.position_embedding_type": ("rope", "learned_absolute"),
    "model.num_query_groups": (4, 4, 2),
    "model.hidden_dropout": (0.0, 0.0, 0.1),
}
# Of other models' layers.
VARIANTS = {
    "model.qk_layernorm": ("true", "false"),
    "model.add_qkv_bias": ("true", "false"),
    "model.use_parallel_residual": ("true", "false"),
    "model.gelu_approximate": ("none", "tanh"),
    "model.rotary_percent": (1.0, 0.5),
    "model.use_rope_scaling": ("true", "false"),
}
OF_ROPE = ("model.rotary_percent", "model.use_rope_scaling")
# Documents apart. EOD is as rare in mock data as any token; with this seed 59 of the first 64
# samples have one. (With fewer tokens than the config's these models learn faster than BOUNDS are
# for.)
DOCUMENTS = {
    "data.reset_position_ids": ("true", "false"),
    "data.reset_attention_mask": ("true", "true", "false"),
    "data.eod_mask_loss": ("true", "false"),
    "data.shuffle_seed": (5747,),
}
# What else is learned, from mock examples, and how.
OBJECTIVES: tuple[dict[str, tuple[Any, ...]], ...] = (
    {
        "train.objective": ("sft",),
        "tuning.packing": ("true", "true", "false"),
        "train.calculate_per_token_loss": ("true", "true", "false"),
    },
    {
        "train.objective": ("dpo",),
        "tuning.label_smoothing": (0.0, 0.1),
        "tuning.length_normalized": ("true", "false"),
        "tuning.sft_loss_weight": (0.0, 0.2),
    },
    {
        "train.objective": ("dpo",),
        "tuning.loss_type": ("ipo",),
        "optimizer.lr": (STEADY_LR,),
    },
)
# Values of these change when work is done, and where, or what is looked at, and no result.
NEUTRAL = {
    "train.recompute_granularity": ("null", "full", "selective"),
    "parallel.overlap_grad_reduce": ("true", "false"),
    "parallel.overlap_param_gather": ("true", "false"),
    "parallel.ddp_bucket_size": (1, 3000, 40_000_000),
    "checkpoint.async_save": ("true", "false"),
    "precision.cache_weight_operands": ("true", "false"),
    "data.num_workers": (0, 0, 1),
    "logging.fp8_stats_interval": ("null", "null", 2),
}
# These decide where row blocks are cut, and with that which rank owns a row.
OWNERS = ("parallel.overlap_param_gather", "parallel.ddp_bucket_size")
FP8_LM = ("te", "o1", "o2", "o3", "o3_long", "o4")
OTHERS = ("te_delayed", "coat", "unit", "deepseek", "mxfp8")
PRECISIONS = ("fp32", "bf16", *FP8_LM, *OTHERS)
# Larger models for those with scales per block, which tensor-parallel ranks do not cut, and the
# most of these ranks.
BLOCKS: dict[str, tuple[Overrides, int]] = {
    "deepseek": (
        {"model.hidden_size": 256, "model.ffn_hidden_size": 512, "optimizer.lr": STEADY_LR},
        2,
    ),
    "mxfp8": ({"model.hidden_size": 128, "model.ffn_hidden_size": 256}, 4),
}
FP32 = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32", "wire.grads": "fp32"}
# Largest relative difference of a loss from one process. fp32: the order of sums. BF16 and FP8:
# every rank rounds what it computes, 2^-9 and 2^-4 of an element; these tiny models learn fast, so
# that differences grow for as long as a case lasts.
BOUNDS = {"fp32": 5e-5, "bf16": 0.02} | dict.fromkeys(PRECISIONS[2:], 0.05)
# Measured, or of whoever ran it: differ between any two runs.
MEASURED = ("iteration-time", "throughput", "tokens-per-second", "timestamp", "time")
LOSSES = ("lm loss", "lm loss validation", "lm loss test")


@dataclass(frozen=True)
class Layout:
    """How many ranks hold the model, and the keys of it."""

    tensor: int
    pipeline: int
    data: int
    keys: Overrides

    @property
    def processes(self) -> int:
        """Of the whole job."""
        return self.tensor * self.pipeline * self.data

    @property
    def overrides(self) -> Overrides:
        """Of the section `parallel`."""
        sizes = {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
        }
        return {f"parallel.{key}": value for key, value in {**sizes, **self.keys}.items()}

    def __str__(self) -> str:
        more = "".join(f" {key}={value}" for key, value in self.keys.items())
        return f"TP{self.tensor} PP{self.pipeline} DP{self.data}{more}"


@dataclass(frozen=True)
class Phase:
    """Under which layout, until which iteration; where the disturbed run is killed, if it is."""

    layout: Layout
    until: int
    kill_after: int | None = None
    kill_delay: float = 0.0


@dataclass(frozen=True)
class Case:
    """One random run; `neutral` are other values of NEUTRAL in the two runs of the phases."""

    number: int
    precision: str
    overrides: Overrides
    phases: list[Phase]
    neutral: tuple[Overrides, Overrides] = field(default_factory=lambda: ({}, {}))

    def __str__(self) -> str:
        kills = sum(phase.kill_after is not None for phase in self.phases)
        phases = ", then ".join(f"{p.layout} to {p.until}" for p in self.phases)
        keys = [k for k, values in {**VARIANTS, **DOCUMENTS}.items() if "true" in values]
        drawn = [key.partition(".")[2] for key in keys if self.overrides.get(key) == "true"]
        objective = [self.overrides[key] for key in ("train.objective",) if key in self.overrides]
        named = ", ".join([self.precision, *objective, *drawn, phases])
        return f"case {self.number}: {named}" + f", {kills} kills" * bool(kills)


def main(argv: list[str]) -> int:
    """Run the cases; 0 if all pass."""
    options = parse(argv)
    numbers = options.only or range(options.runs)
    failed = []
    with JobServer(ROOT) as server:
        for number in tqdm(numbers, unit="case", disable=None):
            case = draw(options.seed, number, options.max_processes)
            problem = check(case, server, options.keep)
            tqdm.write(f"{case}: {problem or 'passed'}", file=sys.stdout)
            sys.stdout.flush()
            if problem:
                failed.append(number)
    print(f"{len(numbers) - len(failed)} of {len(numbers)} cases passed")
    if failed:
        print(
            f"repeat with: python tools/fuzz_layouts.py --seed {options.seed} --max-processes "
            f"{options.max_processes} --only {' '.join(map(str, failed))}"
        )
    return 1 if failed else 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="how many cases (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="what draws them (default: 1)")
    parser.add_argument("--only", type=int, nargs="+", help="the cases of these numbers alone")
    parser.add_argument("--max-processes", type=int, default=8, help="of a job (default: 8)")
    parser.add_argument(
        "--keep", type=folder_to_write, help="a folder for the runs of cases that fail"
    )
    return parser.parse_args(argv)


def draw(seed: int, number: int, max_processes: int) -> Case:
    """Case `number` of `seed`: a function of the three arguments alone."""
    rng = random.Random(f"{seed}/{number}/{max_processes}")
    precision = rng.choice(PRECISIONS)
    overrides = FIXED | {key: rng.choice(values) for key, values in MODELS.items()}
    sizes, most_tensor = BLOCKS.get(precision, ({}, max_processes))
    overrides |= sizes | _precision(rng, precision, str(overrides["model.swiglu"]))
    overrides["train.seed"] = rng.randrange(1000)
    batch = rng.choice((4, 8))
    iterations = rng.randint(3, 6)
    overrides |= _length(rng, batch, iterations)
    ends = [*sorted(rng.sample(range(1, iterations), rng.randint(0, 2))), iterations]
    micro = rng.choice((1, 2))
    overrides["train.micro_batch_size"] = micro
    overrides["train.eval_interval"] = rng.randint(1, iterations)
    on_nodes = overrides.get("precision.grad_reduce") != "fp8_sum"
    # With FP8 sums on the way, and on nodes, the number of replicas and its nodes are numerics.
    phases = [
        Phase(
            draw_layout(
                rng, max_processes, most_tensor, batch // micro, 4 // micro, on_nodes=on_nodes
            ),
            end,
            *_kill(rng, start, end),
        )
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    first, second = ({key: rng.choice(v) for key, v in NEUTRAL.items()} for _ in range(2))
    if rng.random() < 0.4:
        overrides |= {key: rng.choice(values) for key, values in DOCUMENTS.items()}
    if rng.random() < 0.5:
        overrides |= _variants(rng, str(overrides["model.position_embedding_type"]))
    if "data.reset_attention_mask" not in overrides and rng.random() < 0.5:
        objective = rng.choice(OBJECTIVES)
        overrides |= {key: rng.choice(values) for key, values in objective.items()}
    if sums_depend_on_owners(overrides, phases):
        second |= {key: first[key] for key in OWNERS}
    return Case(number, precision, overrides, phases, (first, second))


def _variants(rng: random.Random, positions: str) -> Overrides:
    drawn: Overrides = {key: rng.choice(values) for key, values in VARIANTS.items()}
    left = () if positions == "rope" else OF_ROPE
    return {key: value for key, value in drawn.items() if key not in left}


def _precision(rng: random.Random, name: str, swiglu: str) -> Overrides:
    if name == "fp32":
        return {f"precision.{key}": value for key, value in FP32.items()}
    keys: Overrides = {"preset": name}
    if name != "bf16":
        keys["first_last_layers_bf16"] = rng.choice(("false", "false", "true"))
        for wire in ("gather", "reduce", "pipeline"):
            keys[f"wire.{wire}"] = rng.choice(("null", "fp8", "bf16"))
        keys["smooth_swiglu"] = rng.choice(("false", swiglu))
        if name in BLOCKS:
            keys["wire.gather"] = "bf16"  # parts of so short a sequence have no whole blocks
        else:
            kinds = () if name in ("te_delayed", "unit") else ("input", "grad_output")
            for kind in kinds:
                keys[f"scaling.{kind}"] = rng.choice(("tensor", "tensor", "row"))
            keys["grad_output_format"] = rng.choice(("fp8_e5m2", "fp8_e4m3"))
    if name in ("o1", "o2", "o3"):
        keys["grad_reduce"] = rng.choice(("fp32_accumulate", "fp32_accumulate", "fp8_sum"))
    return {f"precision.{key}": value for key, value in keys.items()}


def _length(rng: random.Random, batch: int, iterations: int) -> Overrides:
    """Iterations of one batch, or a ramp-up from 4 samples to 8."""
    keys: Overrides = {"train.global_batch_size": batch}
    if batch == 8 and rng.random() < 0.5:
        ramp = {"train.rampup_batch_size": "[4,4,12]", "train.train_iters": "null"}
        # Three steps of 4, then 8.
        return (
            keys
            | ramp
            | {"train.train_samples": 12 + 8 * max(1, iterations - 3)}
            | {"scheduler.lr_warmup_fraction": 0.2}
        )
    return keys | {"train.train_iters": iterations}


def sums_depend_on_owners(overrides: Overrides, phases: list[Phase]) -> bool:
    """Whether a sum of gradients is rounded on its way to the owner, whom `OWNERS` decide."""
    on_the_way = str(overrides.get("precision.grad_reduce", "")).startswith("fp8_")
    layouts = [phase.layout.keys for phase in phases]
    return any(
        keys.get("partition") == "even" and (on_the_way or "node_size" in keys) for keys in layouts
    )


def draw_layout(
    rng: random.Random,
    max_processes: int,
    most_tensor: int,
    microbatches: int,
    least: int,
    *,
    on_nodes: bool,
) -> Layout:
    """A layout whose replicas divide `microbatches` a step, and `least` of them where it ramps.

    At most `most_tensor` ranks are tensor-parallel. `on_nodes`: replicas may be summed on nodes
    first.
    """
    while True:
        tensor, pipeline, data = (rng.choice((1, 1, 2, 4)) for _ in range(3))
        fits = tensor * pipeline * data <= max_processes and tensor <= most_tensor
        keys: Overrides = {}
        if tensor > 1:
            keys["sequence_parallel"] = rng.choice(("true", "false"))
        share = data
        if pipeline > 1:
            kind = rng.choice(("1f1b", "zb-h1", "interleaved", "uneven"))
            if kind == "interleaved" and pipeline == 2:
                keys["num_layers_per_virtual_pipeline_stage"] = 1
                share *= pipeline
            elif kind == "uneven" and pipeline == 2:
                keys["decoder_first_pipeline_num_layers"] = rng.choice((1, 3))
            elif kind == "zb-h1":
                keys["pipeline_schedule"] = kind
        if data > 1:
            keys |= rng.choice(({}, {"partition": "even"}, {"use_distributed_optimizer": "false"}))
        if data == 4 and rng.random() < 0.3 and on_nodes:
            keys["node_size"] = 2 * tensor
        if fits and microbatches % share == 0 and least % share == 0:
            return Layout(tensor, pipeline, data, keys)


def _kill(rng: random.Random, start: int, end: int) -> tuple[int | None, float]:
    """After how many more reports, and how many seconds after that."""
    if rng.random() < 0.5:
        return None, 0.0
    return rng.randint(start, end), rng.choice((0.0, rng.uniform(0.0, 0.3)))


def check(case: Case, server: JobServer, keep: Path | None) -> str | None:
    """What is wrong, in one line; None if nothing is."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz_{case.number}_"))
    try:
        problem = _check(case, server, folder)
        if problem and keep is not None:
            shutil.copytree(folder, keep / f"case_{case.number}", dirs_exist_ok=True)
        return problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(case: Case, server: JobServer, folder: Path) -> str | None:
    one, undisturbed, disturbed = (folder / name for name in ("one", "undisturbed", "disturbed"))
    last = Phase(Layout(1, 1, 1, {}), case.phases[-1].until)
    first, second = case.neutral
    try:
        train(server, case, [last], {}, one)
        train(server, case, case.phases, first, undisturbed)
        train(server, case, case.phases, second, disturbed, kills=True)
    except RuntimeError as error:
        return str(error)
    if problem := compare_losses(one, undisturbed, BOUNDS[case.precision]):
        return problem
    return compare_bits(undisturbed, disturbed)


def train(
    server: JobServer,
    case: Case,
    phases: list[Phase],
    neutral: Overrides,
    folder: Path,
    kills: bool = False,
) -> None:
    """Run `phases` one after the other; RuntimeError with the end of the log if one fails."""
    folder.mkdir()
    paths = {f"checkpoint.{key}": folder / "checkpoints" for key in ("save", "load")}
    for phase in phases:
        keys = case.overrides | phase.layout.overrides | neutral | paths
        keys |= {"logging.dir": folder, "checkpoint.save_interval": 2}
        if keys.get("parallel.use_distributed_optimizer") == "false":
            keys.pop("parallel.overlap_param_gather", None)  # nothing to gather: refused
        if phase is not phases[-1]:
            keys["train.exit_interval"] = phase.until
        argv = ["--config", "configs/gpt_tiny.yaml", *(f"{k}={v}" for k, v in keys.items())]
        log, processes = folder / "log.txt", phase.layout.processes
        if kills and phase.kill_after is not None:
            kill = Kill(str(folder / "metrics.jsonl"), phase.kill_after, phase.kill_delay)
            if server.run(argv, processes, log, kill).ok:
                continue
        result = server.run(argv, processes, log)
        if not result.ok:
            lines = [line for line in log.read_text().splitlines() if line.strip()]
            error = next((x for x in lines if "error: " in x), lines[-1] if lines else "no output")
            raise RuntimeError(f"{folder.name} run {result}: {error}")


def reports(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl without what is measured, and without statistics of casts."""
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if any(key.startswith("fp8_stats/") for key in line):
            continue
        yield {
            key: value
            for key, value in line.items()
            if key not in MEASURED and not key.startswith(("memory/", "comm_bytes/", "state_bytes"))
        }


def compare_losses(one: Path, several: Path, bound: float) -> str | None:
    """Whether every loss of `several` is within `bound` of that of one process."""
    pairs = list(zip(reports(one), reports(several), strict=False))
    for single, multiple in pairs:
        for key in LOSSES:
            if (key in single) != (key in multiple):
                return f"iteration {single['iteration']}: one run reports {key}, the other does not"
            if key in single and not math.isclose(single[key], multiple[key], rel_tol=bound):
                return (
                    f"iteration {single['iteration']}: {key} is {multiple[key]:.6f}, of one "
                    f"process {single[key]:.6f}, bound {bound:g}"
                )
    if len(list(reports(one))) != len(list(reports(several))):
        return "the run and one process have different numbers of reports"
    return None if pairs else "no reports"


def compare_bits(undisturbed: Path, disturbed: Path) -> str | None:
    """Whether all reports and all bytes of the last checkpoints are equal."""
    for one, two in zip(reports(undisturbed), reports(disturbed), strict=False):
        if one != two:
            keys = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
            key = min(keys)
            return f"iteration {one['iteration']}: {key} is {one.get(key)} and {two.get(key)}"
    last = (open_checkpoint(folder / "checkpoints") for folder in (undisturbed, disturbed))
    return next(islice(differences(*last), 1), None)


if __name__ == "__main__":
    sys.exit(run_command(main))
