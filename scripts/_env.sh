# Sourced by the other scripts, before they change the folder: sets PYTHON to an interpreter that
# has fp8lm and what it needs.
#
#   FP8LM_PYTHON=$(command -v python)   use this interpreter, the active one for instance, as it is
#                                       and install nothing
#   FP8LM_PIP_ARGS="..."                more arguments for pip: another index, or the CPU build of
#                                       PyTorch, much smaller than the default CUDA build, with
#                                       --extra-index-url https://download.pytorch.org/whl/cpu
#
# Without FP8LM_PYTHON the environment is .venv in this checkout. It is made on the first call and
# brought up to date when pyproject.toml has changed.
# shellcheck shell=bash

fp8lm_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

fp8lm_fail() {
    echo "error: $*" >&2
    exit 2
}

# Print the first interpreter that is new enough; megatron-core has wheels up to Python 3.13.
fp8lm_find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fp8lm_fail "Python 3.11, 3.12 or 3.13 is needed; found: $(python3 --version 2>&1 || true)"
}

fp8lm_make_venv() {
    local venv=$1 base
    base=$(fp8lm_find_python) || exit 2
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fp8lm_fail "$base cannot make environments: install its venv module (python3-venv)"
    echo "making $venv with $("$base" --version)" >&2
    # A folder left by an interrupted attempt would pass for an environment, so start afresh.
    "$base" -m venv --clear "$venv" || fp8lm_fail "cannot make an environment in $venv"
}

# Print where pip looks for packages, as far as its variables, files and FP8LM_PIP_ARGS say.
fp8lm_indexes() {
    local venv=$1 main more
    main=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
    more=$(grep -oE '[a-z]+://[^ ]+' <<<"${FP8LM_PIP_ARGS:-} ${PIP_EXTRA_INDEX_URL:-}" || true)
    echo "${main:-https://pypi.org/simple}${more:+ ${more//$'\n'/ }}"
}

fp8lm_install() {
    local venv=$1 stamp=$1/fp8lm-installed wanted without_gpu=()
    wanted="$(cksum <"$fp8lm_root/pyproject.toml") $fp8lm_root"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    echo "installing fp8lm and what it needs into $venv (minutes the first time)" >&2
    if [[ -z ${FP8LM_PIP_ARGS:-} ]] && ! command -v nvidia-smi >/dev/null; then
        echo "no NVIDIA GPU here: PyTorch's much smaller CPU build comes with" \
            "FP8LM_PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'" >&2
        # The release that the numbers of docs/ were measured with on CPUs: bits differ with others.
        without_gpu=("torch<2.14")
    fi
    # An index that cannot be reached is given up after a second try; one slow answer is not.
    export PIP_RETRIES=${PIP_RETRIES:-1} PIP_TIMEOUT=${PIP_TIMEOUT:-${PIP_DEFAULT_TIMEOUT:-15}}
    # FP8LM_PIP_ARGS holds several arguments: splitting it is meant. A successful install without
    # any of the lines shown as progress is a success, hence the `|| true` behind grep.
    # shellcheck disable=SC2086
    (
        set -o pipefail
        "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
            ${FP8LM_PIP_ARGS:-} "${without_gpu[@]}" --editable "${fp8lm_root}[dev]" |
            { grep --line-buffered -E '^(Collecting|Building|Installing)' || true; } >&2
    ) || fp8lm_fail "installation from $(fp8lm_indexes "$venv") failed, see above;" \
        "FP8LM_PIP_ARGS can name another index, PIP_RETRIES and PIP_TIMEOUT are for slow ones"
    echo "$wanted" >"$stamp"
}

if [[ -n ${FP8LM_PYTHON:-} ]]; then
    PYTHON=$FP8LM_PYTHON
    # A relative path starts where the script was called.
    [[ $PYTHON != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
    # The checkout itself need not be installed there, only what it imports.
    export PYTHONPATH=$fp8lm_root${PYTHONPATH:+:$PYTHONPATH}
    "$PYTHON" - >/dev/null 2>&1 <<'EOF' ||
from importlib.util import find_spec

assert all(map(find_spec, ("torch", "megatron.core", "pydantic", "sentencepiece", "tokenizers")))
EOF
        fp8lm_fail "FP8LM_PYTHON=$PYTHON does not run or lacks the packages of pyproject.toml"
else
    fp8lm_venv=$fp8lm_root/.venv
    [[ -x $fp8lm_venv/bin/python ]] || fp8lm_make_venv "$fp8lm_venv"
    fp8lm_install "$fp8lm_venv"
    PYTHON=$fp8lm_venv/bin/python
fi
export PYTHON
