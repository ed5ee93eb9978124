#!/usr/bin/env bash
# Lint and test: scripts/test.sh [fast|full|lint] [pytest arguments]
#   fast  ruff and the tests not marked slow or gpu: a first look
#   full  all linters and every test (the default); those marked gpu are skipped without CUDA
#   lint  all linters only: ruff, codespell, import-linter, mypy
set -euo pipefail
root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/..

mode=full
case ${1:-} in
fast | full | lint)
    mode=$1
    shift
    ;;
"" | -*) ;;
*)
    (cd "$root" && [[ -e ${1%%::*} ]]) || {
        echo "error: $1 is none of fast, full, lint, and no test" >&2
        exit 2
    }
    ;;
esac

# shellcheck source=scripts/_env.sh
source "$root/scripts/_env.sh"
cd "$root"

"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet . || {
    echo "error: formatting differs: run ruff format" >&2
    exit 1
}

if [[ $mode != fast ]]; then
    "$PYTHON" -m codespell_lib fp8lm tools tests configs scripts docs ./*.md pretrain_gpt.py
    imports=$("$PYTHON" -c 'from importlinter.cli import lint_imports_command as c; c()') || {
        echo "$imports" >&2
        exit 1
    }
    "$PYTHON" -m mypy
fi

# Files of tests on several cores; what was asked for by name in one process, where -s and --pdb work.
workers=()
(($#)) || workers=(-n logical --maxprocesses 4 --dist loadfile)
case $mode in
fast) exec "$PYTHON" -m pytest -q "${workers[@]}" -m "not slow and not gpu" "$@" ;;
full) exec "$PYTHON" -m pytest -q "${workers[@]}" "$@" ;;
lint) echo "no complaints" ;;
esac
