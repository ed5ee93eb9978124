#!/usr/bin/env bash
# From nothing to a GPT trained in FP8 beside its BF16 twin: environment, corpus, tokenizer, data,
# two trainings from the same seed, a table, a picture and a sample. No GPU and no download beyond
# Python packages. Extra arguments are config overrides for both trainings, such as
# train.train_iters=200, but not the presets and folders that tell the two apart. What a former run
# left in runs/quickstart is replaced.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/_env.sh"
cd "$fp8lm_root"

# Mistakes are told before anything is replaced.
case " $* " in *" --help "*) exec "$PYTHON" -m fp8lm.config --help ;; esac
"$PYTHON" -m fp8lm.config --config configs/quickstart.yaml "$@" >/dev/null
for argument in "$@"; do
  case $argument in
  --config* | precision=* | precision.preset=* | logging=* | logging.dir=* | checkpoint=* | \
    checkpoint.save=*)
    fp8lm_fail "${argument%%=*} is set by quickstart.sh itself: drop $argument, or train with" \
      "scripts/train.sh configs/quickstart.yaml $argument"
    ;;
  esac
done

run=runs/quickstart
data=$run/data
prefix=$data/stdlib_text_document
# glibc would return the activations' memory after every step and fault it in again in the next.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296

echo "== Corpus, tokenizer and token files from this Python's own sources: $data"
"$PYTHON" -m fp8lm.runtime.hold "$run" $$ scripts/quickstart.sh # one quickstart at a time
trap 'rm -f "$run/run.lock"' EXIT
find "$run" -mindepth 1 -maxdepth 1 ! -name run.lock -exec rm -rf {} +
mkdir -p "$data"
"$PYTHON" tools/build_corpus.py --output "$data"
"$PYTHON" tools/train_tokenizer.py --input "$data/corpus.jsonl" --vocab-size 1024 \
  --output-prefix "$data/tokenizer"
"$PYTHON" tools/preprocess_data.py --input "$data/corpus.jsonl" --json-keys text \
  --output-prefix "$data/stdlib" --tokenizer-type SentencePieceTokenizer \
  --tokenizer-model "$data/tokenizer.model" --workers 2 --append-eod
[[ -e $prefix.bin ]]

train() { # name, preset, overrides
  local name=$1 preset=$2
  shift 2
  "$PYTHON" pretrain_gpt.py --config configs/quickstart.yaml "precision.preset=$preset" \
    "logging.dir=$run/$name" "checkpoint.save=$run/$name/checkpoints" "$@"
}
echo "== Training in BF16 ($run/bf16, log in $run/bf16.log) and in FP8 ($run/fp8), a core each"
train bf16 bf16 "$@" >"$run/bf16.log" 2>&1 &
bf16=$!
trap 'kill "$bf16" 2>/dev/null || true; rm -f "$run/run.lock"' EXIT
train fp8 o3 "$@"
wait "$bf16" || {
  cat "$run/bf16.log" >&2
  exit 1
}

echo "== BF16 and FP8 side by side: $run/summary.json, $run/loss.png"
"$PYTHON" tools/compare_runs.py "bf16=$run/bf16" "fp8=$run/fp8" \
  --summary "$run/summary.json" --plot "$run/loss.png"

echo "== Written by the FP8 model"
"$PYTHON" tools/generate.py --load "$run/fp8/checkpoints" --prompt "def " --max-new-tokens 120
