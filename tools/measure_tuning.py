"""Instruction and preference tuning in FP8 beside BF16, from the same models over several seeds.

python tools/measure_tuning.py --output runs/tuning --seeds 1 2 3 [--jobs 2] [--json FILE]

Makes a corpus, a tokenizer and examples from the Python that runs this (tools/build_corpus.py,
tools/build_instructions.py), pretrains one small model in BF16, and from it, for each preset and
seed, tunes on conversations (sft) and from there on preferences (dpo). A seed decides on the order
of the data and on rounding. Reported are held-out losses and accuracies before and after, the gap
of FP8 with the 95 % interval of its mean over pairs of seeds (Student's t), what tools/generate.py
answers to held-out questions, and bytes of state per parameter.

Runs that are interrupted go on when the same command is given again.
"""

from __future__ import annotations

import json
import operator
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from build_instructions import FORMAT
from compare_recipes import Training, train_all
from compare_runs import half_width, read_reports

from fp8lm.arguments import EachOnce, file_to_write, folder_to_write, number_type
from fp8lm.config import load_config
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, RunFailed, run_command

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs/quickstart.yaml")
TEMPLATE = ROOT / "configs/chat_templates/plain.jinja"
PRESETS = ("bf16", "o3")
HELD_OUT = "90,10,0"
QUESTIONS = 100  # that tools/generate.py answers, of the held-out ones
STEPS = {"base": 400, "sft": 240, "dpo": 150}
OVERRIDES = {
    "base": ["optimizer.lr=2e-3", "train.eval_iters=20"],
    "sft": ["train.objective=sft", "optimizer.lr=1e-3", "train.eval_iters=20"],
    "dpo": [
        *("train.objective=dpo", "optimizer.lr=3e-4", "train.eval_iters=20"),
        *("tuning.beta=0.5", "tuning.sft_loss_weight=1", "tuning.on_long_example=skip"),
    ],
}
REPORTED = {
    "sft": ("lm loss", "token accuracy"),
    "dpo": ("lm loss", "rewards/accuracies", "rewards/margins", "kl"),
}
STATE = ("state_bytes_per_parameter", "state_bytes_per_linear_parameter")


def main(argv: list[str]) -> None:
    """Make data, train what is not done, print and write."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=folder_to_write, required=True, help="folder of data and runs")
    add("--seeds", type=int, nargs="+", action=EachOnce, default=[1, 2, 3], help="default: 1 2 3")
    add("--jobs", type=number_type(1), default=1, help="runs at a time; default: 1")
    add("--json", type=file_to_write, help="write the numbers to this file")
    options = parser.parse_args(argv)
    folder, seeds = options.output, options.seeds
    make_data(folder / "data")
    train_all([base_run(folder)], 1)
    found: dict[str, Any] = {"seeds": seeds, "steps": STEPS}
    for phase in ("sft", "dpo"):
        runs = {
            preset: [tuning_run(folder, phase, preset, seed) for seed in seeds]
            for preset in PRESETS
        }
        train_all([run for own in runs.values() for run in own], options.jobs)
        found[phase] = summary(phase, {p: [r.folder for r in own] for p, own in runs.items()})
    found["generate"] = {"base": answers(folder, base_run(folder).folder)}
    for phase in ("sft", "dpo"):
        for preset in PRESETS:
            run = tuning_run(folder, phase, preset, seeds[0])
            found["generate"][f"{phase} {preset}"] = answers(folder, run.folder)
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if options.json:
        write_aside(options.json, text)


def make_data(folder: Path) -> None:
    """Corpus, tokenizer, token files and examples, unless they are there."""
    if (folder / "pairs.jsonl").exists():
        return
    corpus, model = folder / "corpus.jsonl", folder / "tokenizer.model"
    prefix = ("--output-prefix", folder / "corpus")
    kind = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model)
    vocabulary = ("--vocab-size", "512", "--output-prefix", folder / "tokenizer")
    run_tool("build_corpus.py", "--output", folder, "--max-mb", "4")
    run_tool("train_tokenizer.py", "--input", corpus, *vocabulary)
    run_tool("preprocess_data.py", "--input", corpus, *prefix, *kind, "--append-eod")
    run_tool("build_instructions.py", "--output", folder)


def run_tool(name: str, *arguments: object) -> str:
    """What a tool prints; RunFailed if it fails."""
    argv = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RunFailed(f"{name} ended with exit code {ended.returncode}: {ended.stderr.strip()}")
    return ended.stdout


def base_run(folder: Path) -> Training:
    """The pretraining that all runs start from."""
    keys = [f"data.data_path=[{folder / 'data/corpus_text_document'}]", "precision.preset=bf16"]
    return training(folder, "base", folder / "base", keys)


def tuning_run(folder: Path, phase: str, preset: str, seed: int) -> Training:
    """The run of a phase, from the phase before."""
    before = {"sft": folder / "base", "dpo": folder / f"sft-{preset}-{seed}"}[phase]
    data = {"sft": "chats.jsonl", "dpo": "pairs.jsonl"}[phase]
    keys = [
        f"data.data_path=[{folder / 'data' / data}]",
        f"data.split='{HELD_OUT}'",
        f"tuning.chat_template={TEMPLATE}",
        f"checkpoint.pretrained={before / 'checkpoints'}",
        f"precision.preset={preset}",
        f"train.seed={seed}",
    ]
    return training(folder, phase, folder / f"{phase}-{preset}-{seed}", keys)


def training(folder: Path, phase: str, place: Path, keys: list[str]) -> Training:
    """A run in the folder `place`; InputError if its config is wrong."""
    overrides = [
        *(f"tokenizer.tokenizer_model={folder / 'data/tokenizer.model'}", "train.num_threads=1"),
        *(f"train.train_iters={STEPS[phase]}", f"train.eval_interval={STEPS[phase] // 2}"),
        *("scheduler.lr_warmup_iters=20", "logging.log_interval=10", "logging.tensorboard=false"),
        *(f"logging.dir={place}", f"checkpoint.save={place / 'checkpoints'}"),
        *(f"checkpoint.load={place / 'checkpoints'}", "checkpoint.save_interval=50"),
        "checkpoint.keep_last=1",
        *OVERRIDES[phase],
        *keys,
    ]
    return Training(place, ("--config", CONFIG, *overrides), load_config(CONFIG, overrides))


def summary(phase: str, folders: dict[str, list[Path]]) -> dict[str, Any]:
    """Held-out numbers of every preset, before and after, and the gap of FP8 to BF16."""
    found: dict[str, Any] = {}
    after: dict[str, dict[str, list[float]]] = {}
    for preset, own in folders.items():
        reports = [list(read_reports(folder / "metrics.jsonl")) for folder in own]
        first, last = (
            {key: [held_out(lines, key)[place] for lines in reports] for key in REPORTED[phase]}
            for place in (0, -1)
        )
        after[preset] = last
        state = next(line for line in reports[0] if STATE[0] in line)
        kinds = ("state_bytes/reference", *STATE)
        found[preset] = {
            "before": first,
            "after": last,
            "state": {key: state[key] for key in kinds if key in state},
        }
    base, other = PRESETS
    gaps = {}
    for key in REPORTED[phase]:
        pairs = zip(after[other][key], after[base][key], strict=True)
        differences = [two - one for two, one in pairs]
        gaps[key] = {"mean": statistics.fmean(differences), "+-": half_width(differences)}
    return found | {f"{other} - {base}": gaps}


def held_out(lines: list[dict[str, float]], key: str) -> list[float]:
    """`key` of every evaluation on held-out examples."""
    return [line[f"{key} validation"] for line in lines if f"{key} validation" in line]


def answers(folder: Path, run: Path) -> dict[str, Any]:
    """How many held-out questions a model answers in the format it was taught, and rightly."""
    lines = (folder / "data/chats.jsonl").read_text().splitlines()
    asked = [json.loads(line)["messages"] for line in lines[-QUESTIONS:]]
    prompts = folder / "prompts.jsonl"
    texts = [f"User: {question['content']}\nAssistant:" for question, _ in asked]
    write_aside(prompts, "".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = ("--load", run / "checkpoints", "--prompts-file", prompts, "--greedy", "--json")
    printed = run_tool("generate.py", *arguments, "--max-new-tokens", 40, "--device", "cpu")
    done = [json.loads(line) for line in printed.splitlines()]
    formed = [
        each["finish_reason"] == "eod" and re.fullmatch(FORMAT, each["text"].strip()) is not None
        for each in done
    ]
    names = [answer["content"].split("`")[1] for _, answer in asked]
    right = [f"`{name}`" in each["text"] for name, each in zip(names, done, strict=True)]
    terse = [
        re.search(r"\((self|cls)?\):", question["content"]) is not None for question, _ in asked
    ]
    preferred = [
        each["text"].strip().startswith("`") == short
        for each, short in zip(done, terse, strict=True)
    ]
    shown = [each["text"] for each in done[:3]]
    return {
        "questions": len(done),
        "in the format, with an end": sum(formed),
        "in the preferred form": sum(map(operator.and_, formed, preferred)),
        "with the right name": sum(right),
        "first answers": shown,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
