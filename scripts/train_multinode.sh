#!/usr/bin/env bash
# Train on several machines: start this on each of them. They meet at machine 0.
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 scripts/train_multinode.sh CONFIG.yaml [key=value ...]
#   scripts/train_multinode.sh --nnodes 4 --node-rank 0 --rdzv-endpoint node0:29400 CONFIG.yaml ...
#   scripts/train_multinode.sh --simulate 2 configs/gpt_tiny.yaml      two "machines" on this one
#   scripts/train_multinode.sh --dry-run --nnodes 16 --nproc-per-node 8 configs/gpt_175b.yaml
# Arguments win over these variables, and these over what SLURM (srun) and Kubeflow (PyTorchJob with
# an elasticPolicy) set:
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE JOB_ID MAX_RESTARTS LOG_DIR LOCAL_ADDR
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/_env.sh"

# Of a variable whose option is given nothing is read, not even nonsense.
given=" "
for argument in "$@"; do given+="${argument%%=*} "; done
arguments=()
option() { # name, value or nothing
  [[ -z ${2:-} || $given == *" $1 "* ]] || arguments+=("$1=$2")
}
simulated=no
[[ $given != *" --simulate "* ]] || simulated=yes
processes=${SLURM_GPUS_ON_NODE:-${PET_NPROC_PER_NODE:-}} restarts=${PET_MAX_RESTARTS:-}
# Kubeflow's ways to say what is done without a number: a process per GPU.
case $processes in auto | gpu) processes= ;; esac
[[ $simulated == no ]] || processes='' restarts='' LOCAL_ADDR=''
if [[ $simulated == no ]]; then
  option --nnodes "${NNODES:-${SLURM_NNODES:-${PET_NNODES:-}}}"
  option --node-rank "${NODE_RANK:-${SLURM_NODEID:-}}"
  if [[ -n ${MASTER_ADDR:-} ]]; then
    # An IPv6 address gets brackets, which set it apart from the port.
    [[ $MASTER_ADDR != *:*:* || $MASTER_ADDR == \[* ]] || MASTER_ADDR="[$MASTER_ADDR]"
    option --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}"
  else
    option --rdzv-endpoint "${PET_RDZV_ENDPOINT:-}"
  fi
  option --rdzv-id "${JOB_ID:-${SLURM_JOB_ID:+$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}}}"
fi
option --nproc-per-node "${NPROC_PER_NODE:-$processes}"
option --max-restarts "${MAX_RESTARTS:-$restarts}"
option --local-addr "${LOCAL_ADDR:-}"
option --log-dir "${LOG_DIR:-}"

exec "$PYTHON" -m fp8lm.launch "${arguments[@]}" "$@"
