#!/usr/bin/env bash
# The body that the scripts in slurm/ share; runs in a job's batch shell:
#   launch/slurm.sh pretrain|finetune|doctor CONFIG.yaml [dotted.key=value ...]
# One torchrun a node, with NPROC_PER_NODE ranks (default: the node's GPUs). The run's folder must be
# one that all nodes see. USR1 (near the time limit) and TERM (preemption, scancel) make the stop file:
# the run saves and leaves, and the job is requeued unless it was cancelled. VITSCALE_SITE_ENV names a
# file to source first: the site's modules and NCCL settings.
set -u
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ -n "${VITSCALE_SITE_ENV:-}" ]; then
    . "$VITSCALE_SITE_ENV" || fail "VITSCALE_SITE_ENV=$VITSCALE_SITE_ENV: cannot be sourced"
fi
use_python

if [ "${1:-}" = doctor ]; then
    exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none "$PYTHON" -m vitscale.launch.slurm node "$@"
fi
run='' asked=''
ask_to_stop() {
    asked=yes
    if [ -n "$run" ]; then touch "$run/stop"; fi
}
trap ask_to_stop USR1 TERM

run=$("$PYTHON" -m vitscale.launch.slurm prepare "$@") || exit
[ -n "$run" ] || exit 0  # requeued, since its storage did not answer
if [ -n "$asked" ]; then touch "$run/stop"; fi

# In a session of its own, srun is not ended by a TERM for this shell. No binding: the ranks share the node's cores.
setsid srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    "$PYTHON" -m vitscale.launch.slurm node "$@" &
step=$!
while wait "$step"; [ $? -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done  # a signal ends wait, not the step

"$PYTHON" -m vitscale.launch.slurm finish "$run"
