#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, proved and measured in one call, without a network:
#   bash launch/gpu_suite.sh OUT          the results; with some in OUT already, what is left is run
# BUDGET_S=480 seconds for all; STAGES=a,c some of them; DEVICE=cpu rehearses all at tiny sizes, with .venv;
# CIFAR10=FOLDER with train/*.tar, test/*.tar and classes.json adds stage i, which trains on them;
# WHEELS=.wheels a folder by launch/gpu_wheels.sh, for packages that this machine's Python lacks.
# docs/measurements.md says what each stage gives. Exit 0: each stage passed or cannot run here; 1: see the
# table; 2: a wrong call.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -eq 1 ] || fail "needs one argument, the folder of the results: bash launch/gpu_suite.sh OUT" 2
[[ ${BUDGET_S:=480} =~ ^[1-9][0-9]{0,8}$ ]] ||
    fail "BUDGET_S=$BUDGET_S: must be a whole number of seconds, 1 to 999999999; leave it out for 480" 2
out=$1
case $out in /*) ;; *) out=$PWD/$out ;; esac
case ${CIFAR10:=} in '' | /*) ;; *) CIFAR10=$PWD/$CIFAR10 ;; esac
has_cuda() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

# The wheels in a folder of their own, which Python looks into first. pip decides whether they fit this Python.
use_wheels() {
    local wheels=${WHEELS:-$ROOT/.wheels} files target problem
    files=("$wheels"/*.whl)
    if [ ! -e "${files[0]}" ]; then
        [ -z "${WHEELS:-}" ] || fail "WHEELS=$WHEELS: holds no wheels; 'bash launch/gpu_wheels.sh $WHEELS' fetches them" 2
        return 0
    fi
    target=${TMPDIR:-/tmp}/vitscale-wheels-$(printf '%s\n' "$PYTHON" "${files[@]##*/}" | cksum | cut -d ' ' -f 1)
    if [ ! -e "$target/installed" ]; then
        rm -rf "$target"
        if ! problem=$("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
            --target "$target" "${files[@]}" 2>&1); then
            problem=${problem##*$'\n'}
            [[ $problem == *"not a supported wheel"* ]] || fail "pip could not install the wheels of $wheels: $problem"
            [ -z "${WHEELS:-}" ] ||
                fail "WHEELS=$WHEELS: must fit $PYTHON; name wheels that do, or leave it out ($problem)" 2
            say "$wheels is passed over: its wheels do not fit $PYTHON ($problem)"
            return 0
        fi
        touch "$target/installed"
    fi
    export PYTHONPATH=$target:$PYTHONPATH
}

if [ "${DEVICE:-cuda}" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
    if [ -x "$VENV/bin/python" ]; then use_python; else set_up run; fi
elif [ "${DEVICE:-cuda}" = cuda ]; then
    PYTHON=$(command -v python3) && has_cuda "$PYTHON" || PYTHON=$VENV/bin/python
    has_cuda "$PYTHON" || fail "no Python here has a torch that sees a GPU; DEVICE=cpu rehearses without one" 2
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    use_wheels
else
    fail "DEVICE=$DEVICE: must be cuda or cpu" 2
fi
cd "$ROOT"
exec "$PYTHON" -m vitscale.bench.gpu_suite "$out" --device "${DEVICE:-cuda}" ${STAGES:+--stages "$STAGES"} \
    ${CIFAR10:+--images "$CIFAR10"} --budget "$((BUDGET_S - SECONDS))"
