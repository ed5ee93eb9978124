"""What the tools are given beside texts and checkpoints."""

from __future__ import annotations

from tests.bad_input.cases import TINY, run, writes

TRAIN = '{"iteration": 1, "lm loss": 2.0, "state_bytes_per_parameter": 7, "x": 1}\n'
VALID = '{"iteration": 1, "lm loss validation": 2.0}\n'


def compare(*arguments, says, metrics=TRAIN + VALID):
    """compare_runs on one run, r/, with a file `a` beside it."""
    files = writes(**{"r/metrics__jsonl": metrics, "a": ""})
    return run("compare_runs", "r=r", *arguments, says=says, prepare=files)


def generate(*arguments, says):
    return run("generate", "--load", "ck", "--prompt", "1", *arguments, says=says)


def convert(source, target, *arguments, says):
    pair = ("--from", source, "--to", target, "--input", "org/model", "--output", "out")
    return run("convert_checkpoint", *pair, *arguments, says=says)


def corpus(max_mb):
    says = f"--max-mb: '{max_mb}' is not a finite number of at least 0"
    return run("build_corpus", "--output", "out", "--max-mb", max_mb, says=says)


REPORTED = writes(**{"r/metrics__jsonl": "x\n"})

CASES = [
    run("bench_step", "--num-attention-heads=0", says="--num-attention-heads: '0' is not a number"),
    run("bench_step", "--num-threads=-1", says="--num-threads: '-1' is not a number of at least 1"),
    run("bench_kernels", "--seconds=-1", says="--seconds: '-1' is not a finite number"),
    run("bench_kernels", "--copy-mib", "0", says="--copy-mib: '0' is not a number of at least 1"),
    run("bench_optimizer", *TINY, "--steps", "0", says="--steps: '0' is not a number of at least"),
    run("bench_step", "--cuda-graphs", "--device=cpu", says="--cuda-graphs needs a GPU: leave it"),
    compare("--plot", "x.xyz", says="--plot: x.xyz: a picture is one of "),
    run("trace_step", "--output", "x.xyz", says="--output: x.xyz: a picture is one of "),
    run("plan", "--output", "x.xyz", says="--output: x.xyz: a picture is one of "),
    *(
        run(tool, *TINY, *more, "precision.preset=deepseek", says="= 64 is not a multiple of 128, ")
        for tool, more in (("trace_step", ()), ("plan", ("--world-size", "1")))
    ),
    run("measure_reduction", "--plot", "x.xyz", says="--plot: x.xyz: a picture is one of "),
    run("measure_reduction", "--plot-blocks", "x.xyz", says="--plot-blocks: x.xyz: a picture"),
    run("compare_layers", "--over-time", "x.xyz", says="--over-time: x.xyz: a picture is one"),
    run("compare_layers", "--by-depth", "x.xyz", says="--by-depth: x.xyz: a picture is one of"),
    run("provoke_swiglu", "--plot", "x.xyz", says="--plot: x.xyz: a picture is one of "),
    run("evaluate", "--heat-map", "x.xyz", says="--heat-map: x.xyz: a picture is one of "),
    compare("--summary", "x", says="metrics.jsonl, line 2: no report", metrics=TRAIN + "7\n"),
    compare(says=("line 1: ", "'{\"iter"), metrics='{"iter\n' + VALID),
    compare(says="validation losses", metrics=TRAIN + VALID[:-5]),
    generate("--top-k", "0", says="--top-k: '0' is not a number of at least 1"),
    generate("--top-k", "x", says="--top-k: 'x' is not a number of at least 1"),
    generate("--temperature", "nan", says="--temperature: 'nan' is not a finite number of"),
    generate("--temperature", "inf", says="--temperature: 'inf' is not a finite number"),
    generate("--temperature=-1", says="--temperature: '-1' is not a finite number"),
    generate("--seed", "9" * 20, says="'99999999999999999999' is more than 18446744073709551615"),
    generate("--max-new-tokens=-1", says="--max-new-tokens: '-1' is not a number of at least 0"),
    generate("--top-p", "0", says="--top-p: '0' is not above 0 and at most 1"),
    generate("--top-p", "1.1", says="--top-p: '1.1' is not above 0 and at most 1"),
    generate("--repetition-penalty", "0", says="--repetition-penalty: '0' is not above 0"),
    generate("--chat", says="--chat"),
    generate("--stream", "--json", says="--stream is for one --prompt"),
    generate("--system", "x", says="--system is for --chat"),
    generate("--kv-cache-dtype", "x", says="--kv-cache-dtype"),
    generate("--tensor-model-parallel-size", "2", says="tensor_model_parallel_size=2"),
    run("generate", "--load", "ck", says=("--prompt", "--chat")),
    run("generate", "--load", "ck", "--prompts-file", "none", says="--prompts-file none"),
    run("report", "runs/none", says=("runs/none", "logging.dir=")),
    run("report", "a=r", "a=r", says="two runs are named a: write NAME=FOLDER"),
    run("report", "--serve", "--output", "x.html", "r", says="--serve writes no --output"),
    run("report", "r", says="line 1: no report", prepare=REPORTED),
    corpus("nan"),
    run("build_corpus", "--output", "$NO/out", says="--output: $NO/out"),
    run(
        "preprocess_data",
        *("--input", "a", "--output-prefix", "p", "--tokenizer-type", "GPT2BPETokenizer"),
        *("--vocab-file", "vocab.json", "--merge-file", "merges.txt"),
        says=("--vocab-file", "--tokenizer-model FOLDER"),
    ),
    corpus("inf"),
    convert("hf", "hf-fp8", says="--from hf --to hf-fp8 is no conversion"),
    convert("hf", "fp8lm", says="names on a hub are not downloaded"),
    convert("fp8lm", "hf", says="no checkpoint in"),
    convert("fp8lm", "hf-fp8", "--dtype", "fp32", says="--dtype: hf-fp8 has the formats"),
    convert("fp8lm", "hf", "--max-shard-size", "0", says="--max-shard-size: '0' is not a number"),
    run(
        "train_tokenizer",
        *("--input", "a", "--vocab-size", "300", "--output-prefix", "t", "--max-mb", "nan"),
        says="--max-mb: 'nan' is not a finite number",
    ),
]
