#!/usr/bin/env bash
# What the first quarter of an hour on a Hopper GPU measures, in order of value. Each leg has its
# own limit and folder under --output and is skipped if it is done, so that the same command goes on
# where it was ended; a leg that fails does not stop the others. Exit code 1 if any has failed. What
# is done is packed as LEG.tar.gz, too.
#   tools/gpu_evidence.sh [--output docs/benchmarks/gpu] [--wheels FOLDER] [--dry-run] [LEG ...]
#   --dry-run  every leg on the CPU, with the smallest sizes: shows that each line of it runs
# Without FP8LM_PYTHON the packages are installed into .venv, as by the other scripts; with it, it
# names a Python that has torch with CUDA, Triton, the packages of pyproject.toml and pytest.
#   --wheels   what that Python lacks, for a machine that reaches no index: tools/gpu_wheels.txt
#              lists it, and how to get it. Unpacked for as long as this runs. Legs:
#   doctor     what the machine has
#   numerics   kernels against the reference, bit for bit, and pytest -m gpu
#   kernels    tools/bench_kernels.py: bandwidth and FLOP/s by operation
#   step_7b    tools/bench_step.py on layers of 7B shape, micro-batches of 1, 2 and 4
#   step_175b  the same on the layers of a rank of 175B under TP 8
#   graphs     micro-batches as CUDA graphs beside launches one by one, 125M and 7B shapes
#   baselines  7B shape beside compiled PyTorch, torchao and TransformerEngine where installed
#   nccl       one process under torchrun with NCCL, asynchronous saves, resumed
#   train      a few minutes of a 125M-class model on text, in BF16 and o3
set -euo pipefail
root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/..
output='' wheels='' dry='' legs=()

fail() {
  echo "error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
  --output | --wheels)
    [[ ${2:-} ]] || fail "$1 needs a folder"
    declare "${1#--}=$2" && shift
    ;;
  --dry-run) dry=yes ;;
  doctor | numerics | kernels | step_7b | step_175b | graphs | baselines | nccl | train) legs+=("$1") ;;
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;;
  *) fail "$1 is no option and no leg: see tools/gpu_evidence.sh --help" ;;
  esac
  shift
done
((${#legs[@]})) || legs=(doctor numerics kernels step_7b step_175b graphs baselines nccl train)
output=$(readlink -m -- "${output:-$root/docs/benchmarks/gpu}")
if [[ $wheels ]]; then
  export FP8LM_PYTHON=${FP8LM_PYTHON:-python3}
  compgen -G "$wheels/*.whl" >/dev/null ||
    fail "--wheels $wheels holds no wheel: tools/gpu_wheels.txt says how to get them"
  command -v "$FP8LM_PYTHON" >/dev/null || fail "FP8LM_PYTHON=$FP8LM_PYTHON does not run"
  site=$(mktemp -d) && trap 'rm -rf "$site"' EXIT
  "$FP8LM_PYTHON" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$site" "$wheels"/*.whl ||
    fail "--wheels $wheels: not for $FP8LM_PYTHON, see above; tools/gpu_wheels.txt says how to get them"
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

# shellcheck source=scripts/_env.sh disable=SC1091
source "$root/scripts/_env.sh"
cd "$root"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || [[ $dry ]] ||
  fail "no CUDA device here: use --dry-run to check the legs on the CPU"
{ mkdir -p "$output" && [[ -w $output ]]; } || fail "--output $output cannot be written: name another"
device=cuda limit=300
[[ ! $dry ]] || device=cpu

doctor() { # folder
  "$PYTHON" -m fp8lm.doctor || (($? == 2)) # 2: it has found something, and says what
}

numerics() {
  local tests=(tests/kernels tests/numerics)
  [[ ! $dry ]] || tests=(tests/kernels/triton/test_amax.py)
  "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml "$1/kernels.xml" "${tests[@]}"
  "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml "$1/gpu.xml" -m gpu tests
}

kernels() {
  local sizes=()
  [[ ! $dry ]] || sizes=(--hidden-size 64 --ffn-hidden-size 64 --tokens 16 --copy-mib 1 --seconds 0.001)
  "$PYTHON" tools/bench_kernels.py --device "$device" "${sizes[@]}" --json "$1/kernels.json"
}

bench_steps() { # folder, sizes: micro-batches of 1, 2 and 4
  local folder=$1 count
  shift
  for count in 1 2 4; do
    "$PYTHON" tools/bench_step.py --device "$device" "$@" --micro-batch-size "$count" \
      --output "$folder/micro_batch_$count.json" --profile "$folder/micro_batch_$count.txt"
  done
}

step_7b() {
  local sizes=(--hidden-size 4096 --num-attention-heads 32 --num-layers 2 --seq-length 2048
    --vocab-size 50304 --num-microbatches 4 --steps 5 --presets 'bf16,te,o3,o3_long')
  [[ ! $dry ]] || sizes=(--hidden-size 32 --num-attention-heads 2 --num-layers 1 --seq-length 16
    --vocab-size 64 --steps 1 --presets 'bf16,o3')
  bench_steps "$1" "${sizes[@]}"
}

step_175b() { # an eighth of the heads and of the MLP, all of the width
  local sizes=(--hidden-size 12288 --num-attention-heads 12 --kv-channels 128
    --ffn-hidden-size 6144 --num-layers 1 --seq-length 2048 --vocab-size 6400
    --num-microbatches 4 --steps 5 --presets 'bf16,te,o3,o3_long')
  [[ ! $dry ]] || sizes=(--hidden-size 32 --num-attention-heads 1 --kv-channels 16
    --ffn-hidden-size 16 --num-layers 1 --seq-length 16 --vocab-size 64 --steps 1 --presets 'bf16,o3')
  bench_steps "$1" "${sizes[@]}"
}

graphs() { # a step that the host's launches bound, and one that they do not
  local small=(--hidden-size 768 --num-attention-heads 12 --num-layers 12 --seq-length 1024
    --vocab-size 50304) large=(--hidden-size 4096 --num-attention-heads 32 --num-layers 2
    --seq-length 2048 --vocab-size 50304)
  local sizes=(--num-microbatches 8 --steps 5 --presets 'bf16,o3' --cuda-graphs)
  [[ ! $dry ]] || small=(--hidden-size 32 --num-attention-heads 2 --num-layers 1 --seq-length 16
    --vocab-size 64) large=("${small[@]}") sizes=(--steps 1 --presets 'bf16,o3')
  "$PYTHON" tools/bench_step.py --device "$device" "${small[@]}" "${sizes[@]}" \
    --micro-batch-size 1 --output "$1/small.json"
  "$PYTHON" tools/bench_step.py --device "$device" "${large[@]}" "${sizes[@]}" \
    --micro-batch-size 1 --output "$1/7b.json"
}

baselines() {
  local names=plain,compiled sizes=(--hidden-size 4096 --num-attention-heads 32 --num-layers 2
    --seq-length 2048 --vocab-size 50304 --micro-batch-size 2 --num-microbatches 4 --steps 5
    --presets 'bf16,o3')
  "$PYTHON" -c 'import torchao.float8' && names+=,torchao_tensorwise,torchao_rowwise
  "$PYTHON" -c 'import transformer_engine.pytorch' && names+=,te_current,te_delayed
  [[ ! $dry ]] || names=plain sizes=(--hidden-size 32 --num-attention-heads 2 --num-layers 1
    --seq-length 16 --vocab-size 64 --steps 1 --presets 'bf16,o3')
  "$PYTHON" tools/bench_step.py --device "$device" --baselines "$names" "${sizes[@]}" \
    --output "$1/baselines.json"
}

nccl() {
  local run="$1/run" iterations
  for iterations in 4 8; do # the second goes on from the first one's checkpoint
    "$PYTHON" -m torch.distributed.run --nproc-per-node=1 --master-port=0 --rdzv-backend=c10d \
      --rdzv-endpoint=localhost:0 pretrain_gpt.py --config configs/gpt_tiny.yaml \
      "train.device=$device" "train.train_iters=8" "train.exit_interval=$iterations" \
      "checkpoint.save=$run/checkpoints" "checkpoint.load=$run/checkpoints" \
      checkpoint.async_save=true checkpoint.save_interval=2 checkpoint.keep_last=1 \
      "logging.dir=$run" logging.log_interval=1
  done
  cp "$run/metrics.jsonl" "$1/" && rm -rf "$run"
}

train() {
  local data=$1/data preset sizes=(train.train_iters=300 train.eval_interval=100)
  [[ ! $dry ]] || sizes=(train.train_iters=2 train.eval_iters=1 train.eval_interval=2 logging.log_interval=1
    model.num_layers=1 model.hidden_size=64 model.num_attention_heads=2 model.seq_length=32
    train.global_batch_size=2 train.micro_batch_size=2 scheduler.lr_warmup_iters=0)
  "$PYTHON" tools/build_corpus.py --output "$data"
  "$PYTHON" tools/train_tokenizer.py --input "$data/corpus.jsonl" --vocab-size 1024 \
    --output-prefix "$data/tokenizer"
  "$PYTHON" tools/preprocess_data.py --input "$data/corpus.jsonl" --json-keys text \
    --output-prefix "$data/stdlib" --tokenizer-type SentencePieceTokenizer \
    --tokenizer-model "$data/tokenizer.model" --workers 2 --append-eod
  for preset in bf16 o3; do
    "$PYTHON" pretrain_gpt.py --config configs/gpt_125m.yaml "precision.preset=$preset" \
      "train.device=$device" train.global_batch_size=16 train.micro_batch_size=8 \
      train.train_samples=null train.rampup_batch_size=null scheduler.lr_warmup_iters=30 \
      "data.data_path=[$data/stdlib_text_document]" 'data.split="95,5,0"' \
      tokenizer.tokenizer_type=SentencePieceTokenizer tokenizer.vocab_size=null \
      "tokenizer.tokenizer_model=$data/tokenizer.model" "logging.dir=$1/$preset" \
      checkpoint.save=null checkpoint.load=null "${sizes[@]}"
  done
  rm -rf "$data"
  "$PYTHON" tools/compare_runs.py "bf16=$1/bf16" "o3=$1/o3" --summary "$1/summary.json" \
    --plot "$1/loss.png"
}

pack() { # leg; the archive is whole, or not there
  local archive=$output/$1.tar.gz
  {
    tar --create --gzip --file "$archive.part" --directory "$output" "$1" &&
      mv "$archive.part" "$archive"
  } || {
    rm -f "$archive.part"
    fail "$archive cannot be written: make room, and the same command goes on"
  }
}

export -f doctor numerics kernels bench_steps step_7b step_175b graphs baselines nccl train
export PYTHON device dry
failed=()
for leg in "${legs[@]}"; do
  folder=$output/$leg
  if [[ -e $folder/done ]]; then
    echo "$leg: done before, in $folder"
    [[ -e $output/$leg.tar.gz ]] || pack "$leg"
    continue
  fi
  if [[ -d $folder && ! -e $folder/log.txt && -n $(ls -A "$folder") ]]; then
    fail "$folder is not of this script: use another --output"
  fi
  { rm -rf "$folder" && mkdir "$folder"; } || fail "$folder cannot be made anew"
  echo "$leg: at most $limit s, $folder/log.txt"
  if timeout "$limit" bash -euo pipefail -c "$leg \"\$1\"" "$leg" "$folder" >"$folder/log.txt" 2>&1; then
    touch "$folder/done"
    pack "$leg"
  else
    failed+=("$leg")
    tail -n 5 "$folder/log.txt" >&2
  fi
done
((!${#failed[@]})) || {
  echo "error: failed: ${failed[*]}; the same command tries them again" >&2
  exit 1
}
