#!/usr/bin/env bash
# Sets up .venv for development and runs what CI runs: ruff, mypy, the tests.
#   bash launch/test.sh [--full] [pytest's arguments]       --full: the long tests too
# The tests that need Slurm run where this is root on Debian or Ubuntu, or Slurm is installed.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up dev
cd "$ROOT"

install_slurm() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge
}
if ! command -v slurmctld >/dev/null && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    say "Installing Slurm and munge for the tests"
    install_slurm >"$VENV/slurm.log" 2>&1 || say "could not install Slurm (see $VENV/slurm.log): its tests do not run"
fi

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check vitscale tests
"$PYTHON" -m mypy
if [ $# -gt 0 ] && [ "$*" != --full ]; then
    exec "$PYTHON" -m pytest "$@"
fi
# All of them: two halves side by side, as each waits for other processes half of its time.
"$PYTHON" -m pytest -p no:cacheprovider tests/integration "$@" >"$VENV/integration.log" 2>&1 &
integration=$!
trap 'kill $integration 2>/dev/null || true' EXIT
code=0
"$PYTHON" -m pytest --ignore=tests/integration "$@" || code=$?
wait $integration || code=$?
say "tests/integration:"
cat "$VENV/integration.log"
exit $code
