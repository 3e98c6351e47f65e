# Sourced by the scripts beside it: where the repository is, which Python runs it, and how both are set up.
# VITSCALE_VENV names another virtual environment than .venv in the repository's root.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VITSCALE_VENV:-$ROOT/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
export VITSCALE_VENV=$VENV  # for the scripts that these scripts call, from whatever folder

say() { printf '%s\n' "$*"; }

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit "${2:-1}"
}

# The Python to train with: the virtual environment's, or where there is none (a container, a module) the PATH's.
use_python() {
    PYTHON=$VENV/bin/python
    if [ ! -x "$PYTHON" ]; then
        PYTHON=$(command -v python3) || fail "no Python here; 'bash launch/quickstart.sh' makes $VENV"
        "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not (u.find_spec("torch") and u.find_spec("yaml")))' ||
            fail "$PYTHON has no torch or no yaml; 'bash launch/quickstart.sh' makes $VENV; or load your own environment first"
    fi
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
}

# A Python that can make the virtual environment.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$candidate cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"
            say "$candidate"
            return
        fi
    done
    fail "needs Python 3.11, 3.12 or 3.13, found $(python3 --version 2>&1 || true); name one: PYTHON=/path/to/python3.12 bash $0"
}

# set_up run|dev: make the virtual environment and install this checkout into it, unless that is done.
set_up() {
    local kind=$1 stamp log base other
    stamp="$ROOT $(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
    log=$VENV/setup.log
    if "$VENV/bin/python" -c '' 2>/dev/null && grep -qsxF "$stamp" "$VENV/installed-dev" "$VENV/installed-$kind"; then
        use_python
        return
    fi
    other=$(cat "$VENV"/installed-* 2>/dev/null | head -n 1 | sed 's/ [0-9]* [0-9]*$//')
    if [ -n "$other" ] && [ "$other" != "$ROOT" ] && [ -d "$other" ]; then
        fail "$VENV belongs to the checkout $other; name another folder by VITSCALE_VENV"
    fi
    base=$(find_python) || exit 1
    if has_gpu; then cost="PyTorch comes with CUDA's libraries, several GB"; else cost="about 3 minutes and 2 GB"; fi
    say "Setting up $VENV, once: $cost. What pip says goes to $log"
    make_venv "$base"
    rm -f "$VENV"/installed-*
    install_packages "$kind" >"$log" 2>&1 || fail "pip could not install vitscale: $(grep -i error "$log" | tail -n 1) (all of it: $log)"
    say "$stamp" >"$VENV/installed-$kind"
    use_python
}

# Make the virtual environment, or make a broken one anew (its Python may have gone with an upgrade).
make_venv() {
    if "$VENV/bin/python" -c '' 2>/dev/null; then return; fi
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        fail "$VENV is there and is no virtual environment; name another folder by VITSCALE_VENV"
    fi
    "$1" -m venv --clear "$VENV" || fail "$1 could not make $VENV"
}

install_packages() {
    local pip=("$VENV/bin/python" -m pip install --disable-pip-version-check) extra=
    [ "$1" = dev ] && extra='[dev]'
    if has_gpu; then
        "${pip[@]}" --editable "$ROOT$extra" ${extra:+torchvision timm}
    else
        "${pip[@]}" --editable "$ROOT$extra" --constraint "$ROOT/constraints.txt" || return
        # Only for comparison in tests. torchvision's wheel asks for CUDA's libraries; its Python part does without.
        [ -z "$extra" ] || "${pip[@]}" --no-deps "torchvision<0.29" timm
    fi
}

has_gpu() { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }
