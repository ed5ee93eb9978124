#!/usr/bin/env bash
# From nothing to a GPT trained in FP8 beside its BF16 twin: environment, corpus, tokenizer, data,
# two trainings from the same seed, a table, a picture and a sample. No GPU and no download beyond
# Python packages. Extra arguments are config overrides for both trainings, such as
# train.train_iters=200.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/_env.sh
source scripts/_env.sh

run=runs/quickstart
data=$run/data
prefix=$data/stdlib_text_document
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that wait leave the cores to others

echo "== Corpus, tokenizer and token files from this Python's own sources: $data"
rm -rf "$run"
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
  echo "== Training with precision.preset=$preset: $run/$name"
  "$PYTHON" pretrain_gpt.py --config configs/quickstart.yaml "precision.preset=$preset" \
    "logging.dir=$run/$name" "checkpoint.save=$run/$name/checkpoints" "$@"
}
train bf16 bf16 "$@"
train fp8 o3 "$@"

echo "== BF16 and FP8 side by side: $run/summary.json, $run/loss.png"
"$PYTHON" tools/compare_runs.py "bf16=$run/bf16" "fp8=$run/fp8" \
  --summary "$run/summary.json" --plot "$run/loss.png"

echo "== Written by the FP8 model"
"$PYTHON" tools/generate.py --load "$run/fp8/checkpoints" --prompt "def " --max-new-tokens 120
