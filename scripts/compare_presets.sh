#!/usr/bin/env bash
# The comparison of docs/concepts/numerics.md: BF16 and FP8 (preset o3, its master weight rounded
# stochastically or to nearest) from the same seeds, 20 M tokens a run, one run per core at a time.
# An hour and a half on two cores. Finished runs are kept, so that it can be called again.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/_env.sh"
cd "$fp8lm_root"

# shellcheck source=scripts/_corpus.sh
source scripts/_corpus.sh

run=runs/compare
jobs=$(nproc)
make_corpus "$run/data"

train() { # name, preset, master rounding, seed
  local folder=$run/$1-$4
  [[ -e $folder/done ]] && return
  mkdir -p "$folder"
  "$PYTHON" pretrain_gpt.py --config configs/gpt_mini.yaml "precision.preset=$2" \
    "precision.master_rounding=$3" "train.seed=$4" "logging.dir=$folder" >"$folder/log.txt" 2>&1
  touch "$folder/done"
}
export -f train
export PYTHON run
for seed in 1 2 3; do
  printf '%s\n' "bf16 bf16 nearest $seed" "o3 o3 stochastic $seed" "o3-nearest o3 nearest $seed"
done | xargs -P "$jobs" -L 1 bash -euc 'train "$@"' train

"$PYTHON" tools/compare_runs.py "bf16=$run/bf16-1,$run/bf16-2,$run/bf16-3" \
  "o3=$run/o3-1,$run/o3-2,$run/o3-3" \
  "o3, nearest=$run/o3-nearest-1,$run/o3-nearest-2,$run/o3-nearest-3" \
  --summary "$run/summary.json" --plot "$run/loss.png"
