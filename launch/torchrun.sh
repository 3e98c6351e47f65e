#!/usr/bin/env bash
# A run on all GPUs of this node, or on several nodes:
#   launch/torchrun.sh pretrain|finetune|doctor CONFIG.yaml [dotted.key=value ...]
#   launch/torchrun.sh evaluate RUN|MODEL [--out FOLDER] [dotted.key=value ...]
# NPROC_PER_NODE, NNODES, RDZV_ENDPOINT, RESTARTS and the exit codes: launch/torchrun.sh --help
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_python
exec "$PYTHON" -m vitscale.launch.torchrun "$@"
