#!/usr/bin/env bash
# Train on this machine: a process per GPU, or one without GPUs.
#   scripts/train.sh [--nproc-per-node M] [--log-dir DIR] [--dry-run] CONFIG.yaml [key=value ...]
# --help lists the options. Exit codes: 0 done, 2 bad input, 75 saved and to be continued, others a
# failure.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/_env.sh"

exec "$PYTHON" -m fp8lm.launch "$@"
