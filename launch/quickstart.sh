#!/usr/bin/env bash
# The whole main job on this machine, on real images and without a GPU: sets up .venv, packs scikit-learn's
# scanned digits into shards, pretrains a small ViT by MAE on 2 ranks with ZeRO-2, scores its frozen features.
#   bash launch/quickstart.sh [dotted.key=value ...]        say train.steps=1800, to go on from 900
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
for override in "$@"; do
    case $override in
        run.name*=* | run.dir*=* | run=*name:* | run=*dir:*)
            fail "$override: the folder is fixed here, runs/quickstart; for another: launch/torchrun.sh pretrain CONFIG" 2 ;;
    esac
done
set_up run
cd "$ROOT"
export CUDA_VISIBLE_DEVICES=  # where there is a GPU too: two ranks as small as these have no use for it
run=$ROOT/runs/quickstart

# Whether summary.json is of the newest checkpoint, and holds its scores.
is_scored() {
    local newest
    newest=$(find "$run/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort | tail -n 1)
    [ -n "$newest" ] && grep -qs "\"steps\": $((10#${newest##*_}))," "$run/summary.json" &&
        grep -qs '"evaluation"' "$run/summary.json"
}

if [ $# -eq 0 ] && is_scored; then
    say "This run is done; its results again. To go on training: bash launch/quickstart.sh train.steps=1800"
else
    "$PYTHON" -m vitscale.prepare.digits "$ROOT/runs/quickstart-data"
    code=0
    NPROC_PER_NODE=2 bash launch/torchrun.sh pretrain configs/quickstart.yaml \
        "$@" run.dir=runs run.name=quickstart || code=$?
    [ "$code" -ne 3 ] || fail "stopped; the same command goes on from the checkpoint" 3
    [ "$code" -eq 0 ] || fail "training failed, see above" "$code"
fi

show=
if is_scored; then show=--show; fi  # the scores are there: print them, recompute nothing
say "
Frozen features on held-out digits (pixels: the images as they are; 8x8 digits hardly need a model):"
"$PYTHON" -m vitscale.cli evaluate $show "$run"
say "
Where everything is:
  $run/model          the encoder and decoder, for transformers
  $run/figures        loss.png, reconstructions.png
  $run/summary.json   the scores; metrics.jsonl: every logged step; checkpoints/; config.yaml: every key

Three things to try next, from $ROOT:
  look in MLflow            $VENV/bin/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///$run/mlflow.db
  go on training            bash launch/quickstart.sh train.steps=1800
  pretrain on your images (one folder a class; small batches, for few images and one GPU):
    . $VENV/bin/activate
    vitscale pack MY_IMAGES my_shards --held-out 0.05 &&
    vitscale pretrain configs/pretrain_vit_s_mae.yaml run.name=mine data.train='my_shards/train/*.tar' \\
        train.global_batch=256 train.micro_batch=64 &&
    vitscale evaluate runs/mine evaluation.test='my_shards/test/*.tar'"
