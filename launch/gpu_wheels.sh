#!/usr/bin/env bash
# Fetches what a GPU machine without a network lacks, for WHEELS= of launch/gpu_suite.sh:
#   bash launch/gpu_wheels.sh FOLDER          wheels that are in it already are replaced
# Made for x86-64 with Python 3.12 that has torch for CUDA 13, accelerate, transformers, timm and what these need,
# but none of the packages below. Refuses to keep more than 40 MiB.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -eq 1 ] || fail "needs one argument, the folder for the wheels: bash launch/gpu_wheels.sh FOLDER" 2
most=$((40 << 20))
# deepspeed wants pydantic; this one does with a typing_extensions of 2024, and names its core's version.
packages=(nvidia-nvimgcodec-cu13 simplejpeg webdataset braceexpand hjson msgpack annotated-types
    pydantic==2.11.10 pydantic-core==2.33.2 typing-inspection==0.4.0)
pip() { "$PYTHON" -m pip "$@" --disable-pip-version-check --quiet --no-deps; }

PYTHON=$VENV/bin/python
[ -x "$PYTHON" ] || PYTHON=$(find_python)
mkdir -p "$1"
draft=$(mktemp -d "$(cd "$1" && pwd)/.draft.XXXXXX")
trap 'rm -rf "$draft"' EXIT
pip download --dest "$draft" --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "${packages[@]}" ||
    fail "pip could not fetch the wheels"
# deepspeed comes as source; its own operators are not built, and none of them is used here.
DS_BUILD_OPS=0 pip wheel --wheel-dir "$draft" --no-binary deepspeed "deepspeed>=0.19.4" || fail "pip could not build deepspeed"

cd "$draft"
sum=$(cat ./*.whl | wc -c)
wc -c ./*.whl | sed '$d'
say "together: $((sum >> 20)) MiB ($sum bytes)"
[ "$sum" -le "$most" ] || fail "these wheels are more than the $((most >> 20)) MiB that they may be"
rm -f ../*.whl
mv ./*.whl ..
