#!/usr/bin/env bash
#SBATCH --job-name=vitscale
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Pretrain a ViT-H by MAE; the same command again goes on where the run stopped. From the repository's root:
#   DATA='/shards/train-{000000..001023}.tar' sbatch slurm/pretrain_vit_h.sh [dotted.key=value ...]
#   CONFIG=my.yaml DATA=... sbatch --nodes=16 --gpus-per-node=4 slurm/pretrain_vit_h.sh run.name=mine
# From elsewhere, VITSCALE_HOME names the root. The environment's other settings: launch/slurm.sh

home=${VITSCALE_HOME:-$SLURM_SUBMIT_DIR}
if [ ! -f "$home/launch/slurm.sh" ]; then
    echo "no launch/slurm.sh in $home: submit from vitscale's root, or set VITSCALE_HOME to it" >&2
    exit 2
fi
config=${CONFIG:-$home/configs/pretrain_vit_h_mae.yaml}
exec bash "$home/launch/slurm.sh" pretrain "$config" ${DATA:+"data.train=$DATA"} "$@"
