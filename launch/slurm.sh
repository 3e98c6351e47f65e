#!/usr/bin/env bash
# The body that the scripts in slurm/ share; runs in a job's batch shell:
#   launch/slurm.sh pretrain|finetune|doctor CONFIG.yaml [dotted.key=value ...]
#   launch/slurm.sh evaluate RUN|MODEL [--out FOLDER] [dotted.key=value ...]
# One torchrun a node, with NPROC_PER_NODE ranks (default: the node's GPUs). The run's folder must be
# one that all nodes see. USR1 (near the time limit) and TERM (preemption, scancel) make the stop file:
# the run saves and leaves. The job is requeued then, and after a fault of the infrastructure, unless it was
# cancelled. VITSCALE_SITE_ENV names a file to source first: the site's modules and NCCL settings.
set -u
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ -n "${VITSCALE_SITE_ENV:-}" ]; then
    . "$VITSCALE_SITE_ENV" || fail "VITSCALE_SITE_ENV=$VITSCALE_SITE_ENV: cannot be sourced"
fi
use_python

# A task of an array: %a in the arguments is its number, as in sbatch's --output.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"; fi
if [ "${1:-}" = doctor ] || [ "${1:-}" = evaluate ]; then  # with nothing to save, nor to go on with
    exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none "$PYTHON" -m vitscale.launch.slurm node "$@"
fi

run='' step='' asked=''
ask_to_stop() {
    asked=yes
    if [ -n "$run" ]; then touch "$run/stop"; elif [ -n "$step" ]; then kill -TERM "$step" 2>/dev/null; fi
}
trap ask_to_stop USR1 TERM
finished() {  # the exit code of $step; a signal ends wait, not the step
    local code
    while wait "$step"; code=$?; [ $code -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done
    return $code
}

answer=$(mktemp) || exit
"$PYTHON" -m vitscale.launch.slurm prepare "$@" >"$answer" &
step=$!
finished
code=$?
run=$(cat "$answer")
rm "$answer"
if [ -z "$run" ]; then
    # Asked to stop before it could hear that.
    if [ -n "$asked" ] && [ $code -gt 128 ]; then exec "$PYTHON" -m vitscale.launch.slurm requeue; fi
    exit $code  # 0 where the job is requeued: it was asked to stop, or its storage did not answer
fi
if [ -n "$asked" ]; then touch "$run/stop"; fi

# In a session of its own, srun is not ended by a TERM for this shell. No binding: the ranks share the node's cores.
setsid srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    "$PYTHON" -m vitscale.launch.slurm node "$@" &
step=$!
finished

"$PYTHON" -m vitscale.launch.slurm finish "$run"
