#!/usr/bin/env bash
# The comparison of layouts in docs/concepts/parallelism.md: one model, three seeds, the same
# batches, on one process in BF16 and FP8, and on several with FP8 on none, some or all wires.
# 400 steps of 8192 tokens each. Finished runs are kept, so that it can be called again.
#   scripts/compare_layouts.sh [tensor-data|pipelines] [section.key=value ...]
# The first argument chooses half of it; overrides are for all runs.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/_env.sh"
cd "$fp8lm_root"
# shellcheck source=scripts/_corpus.sh
source scripts/_corpus.sh

parts="tensor-data pipelines"
case ${1:-} in tensor-data | pipelines) parts=$1 && shift ;; esac

run=runs/layouts
make_corpus runs/compare/data
shared=(model.num_attention_heads=4 train.train_iters=400 train.eval_interval=100
  scheduler.lr_warmup_iters=40 train.eval_iters=40 "$@")

train() { # name, processes, overrides
  local seed
  for seed in 1 2 3; do train_seed "$seed" "$@"; done
}
train_seed() {
  local seed=$1 folder=$run/$2-$1 processes=$3
  shift 3
  [[ -e $folder/done ]] && return
  echo "$folder: $processes processes, $*"
  mkdir -p "$folder"
  OMP_NUM_THREADS=1 "$PYTHON" -m torch.distributed.run --nproc-per-node="$processes" \
    --master-port=0 --rdzv-backend=c10d --rdzv-endpoint=localhost:0 pretrain_gpt.py \
    --config configs/gpt_mini.yaml "${shared[@]}" "train.seed=$seed" "logging.dir=$folder" "$@" \
    >"$folder/log.txt" 2>&1 || { tail -n 20 "$folder/log.txt" >&2 && exit 1; }
  touch "$folder/done"
}

compare() { # file name; the runs are in `names`
  local name settings=()
  for name in "${names[@]}"; do
    settings+=("$name=$run/$name-1,$run/$name-2,$run/$name-3")
  done
  "$PYTHON" tools/compare_runs.py "${settings[@]}" --summary "$run/$1.json" --plot "$run/$1.png"
}

tp2=(2 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true)
tp4=(4 parallel.tensor_model_parallel_size=4 parallel.sequence_parallel=true)
no_sp=parallel.sequence_parallel=false
bf16=(precision.wire.gather=bf16 precision.wire.reduce=bf16)

tensor_data() {
  train bf16 1 precision.preset=bf16
  train o3 1
  train tp2-bf16-wires "${tp2[@]}" "${bf16[@]}"
  train tp2-gather "${tp2[@]}" precision.wire.reduce=bf16
  train tp2-reduce "${tp2[@]}" precision.wire.gather=bf16
  train tp2 "${tp2[@]}"
  train tp2-no-sp "${tp2[@]}" "$no_sp"
  train tp2-no-sp-bf16-wires "${tp2[@]}" "$no_sp" "${bf16[@]}"
  train tp4-bf16-wires "${tp4[@]}" "${bf16[@]}"
  train tp4 "${tp4[@]}"
  train tp4-no-sp "${tp4[@]}" "$no_sp"
  dp4=(4 train.micro_batch_size=16)
  train dp4-bf16 "${dp4[@]}" precision.preset=bf16
  train dp4 "${dp4[@]}"
  train dp4-fp8-sum "${dp4[@]}" precision.grad_reduce=fp8_sum
  train dp2-tp2 "${tp2[@]/#2/4}" train.micro_batch_size=32

  names=(bf16 o3 tp2-bf16-wires tp2-gather tp2-reduce tp2 tp2-no-sp-bf16-wires tp2-no-sp
    tp4-bf16-wires tp4 tp4-no-sp dp4-bf16 dp4 dp4-fp8-sum dp2-tp2)
  compare tensor-data
}

# Pipelines need more layers, so a baseline of their own.
pipelines() {
  shared+=(model.num_layers=4)
  pp2=(parallel.pipeline_model_parallel_size=2 train.micro_batch_size=16)
  pp4=(parallel.pipeline_model_parallel_size=4 train.micro_batch_size=16)
  train 4-layers-bf16 1 precision.preset=bf16
  train 4-layers-o3 1
  train pp2 2 "${pp2[@]}"
  train pp2-bf16-wire 2 "${pp2[@]}" precision.wire.pipeline=bf16
  train pp2-interleaved 2 "${pp2[@]}" parallel.num_layers_per_virtual_pipeline_stage=1
  train pp4-zb-h1 4 "${pp4[@]}" parallel.pipeline_schedule=zb-h1
  train tp2-pp2-dp2 8 "${pp2[@]}" "${tp2[@]:1}"

  names=(4-layers-bf16 4-layers-o3 pp2-bf16-wire pp2 pp2-interleaved pp4-zb-h1 tp2-pp2-dp2)
  compare pipelines
}

for part in $parts; do "${part/-/_}"; done
