#!/usr/bin/env bash
# The whole main job on this machine, on real images and without a GPU: sets up .venv, packs scikit-learn's
# scanned digits into shards, pretrains a small ViT by MAE on 2 ranks with ZeRO-2, scores its frozen features.
#   bash launch/quickstart.sh [dotted.key=value ...]        say train.steps=1800, to go on from 900
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up run
cd "$ROOT"
export CUDA_VISIBLE_DEVICES=  # where there is a GPU too: two ranks as small as these have no use for it
run=$ROOT/runs/quickstart

if [ $# -eq 0 ] && grep -qs '"evaluation"' "$run/summary.json"; then
    say "This run is done; its results again. To go on training: bash launch/quickstart.sh train.steps=1800"
else
    "$PYTHON" -m vitscale.data.digits "$ROOT/runs/quickstart-data"
    code=0
    NPROC_PER_NODE=2 bash launch/torchrun.sh pretrain configs/quickstart.yaml \
        "$@" run.dir=runs run.name=quickstart || code=$?
    [ "$code" -ne 3 ] || fail "stopped; the same command goes on from the checkpoint" 3
    [ "$code" -eq 0 ] || fail "training failed, see above" "$code"
fi

say "
Frozen features on held-out digits (pixels: the images as they are; 8x8 digits hardly need a model):"
"$PYTHON" -m vitscale.cli evaluate "$run"
say "
Where everything is:
  $run/model          the encoder and decoder, for transformers
  $run/figures        loss.png, reconstructions.png
  $run/summary.json   the scores; metrics.jsonl: every logged step; checkpoints/; config.yaml: every key

Three commands to try next, from $ROOT:
  look in MLflow             $VENV/bin/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///$run/mlflow.db
  go on training             bash launch/quickstart.sh train.steps=1800
  pretrain on your images    $VENV/bin/vitscale pack MY_IMAGES my_shards --held-out 0.05 &&
                               bash launch/torchrun.sh pretrain configs/pretrain_vit_s_mae.yaml \\
                               run.name=mine data.train='my_shards/train/*.tar'"
