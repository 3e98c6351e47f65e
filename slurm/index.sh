#!/usr/bin/env bash
#SBATCH --job-name=vitscale-index
#SBATCH --array=1-16
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

# Count and hash shards by many tasks; the last one to end writes the index. From the repository's root:
#   OUT=/shards/index.json sbatch [--array=1-64] slurm/index.sh '/shards/train-{000000..099999}.tar' [--label txt ...]
# After tasks that failed, submit it again, with as many tasks as you like: what was read once is not read again.
# From elsewhere, VITSCALE_HOME names the root; VITSCALE_SITE_ENV a file to source first.

home=${VITSCALE_HOME:-$SLURM_SUBMIT_DIR}
if [ ! -f "$home/launch/environment.sh" ]; then
    echo "no launch/environment.sh in $home: submit from vitscale's root, or set VITSCALE_HOME to it" >&2
    exit 2
fi
. "$home/launch/environment.sh"
if [ -z "${OUT:-}" ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    fail "name the file to write by OUT=/shards/index.json, and submit by sbatch --array=1-16" 2
fi
if [ -n "${VITSCALE_SITE_ENV:-}" ]; then
    . "$VITSCALE_SITE_ENV" || fail "VITSCALE_SITE_ENV=$VITSCALE_SITE_ENV: cannot be sourced"
fi
use_python
step=${SLURM_ARRAY_TASK_STEP:-1}
number=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / step + 1))
if [ $(((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / step + 1)) -ne "$SLURM_ARRAY_TASK_COUNT" ]; then
    fail "--array has gaps, so that nobody reads some shards: submit --array=1-$SLURM_ARRAY_TASK_COUNT" 2
fi
exec "$PYTHON" -m vitscale.cli index --out "$OUT" --part "$number/$SLURM_ARRAY_TASK_COUNT" "$@"
