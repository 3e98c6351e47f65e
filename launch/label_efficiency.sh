#!/usr/bin/env bash
# What pretraining is worth with few labels, on CIFAR-10: a small ViT pretrained by MAE on all images, then fine-tuned, and
# its frozen features classified, with 1%, 10% and 100% of the labels, beside the same network from scratch with the same
# augmentation and as many steps. Prints a table at the end.
#   bash launch/label_efficiency.sh SHARDS [OUT [KEY=VALUE ...]]      SHARDS: a folder with train/*.tar, test/*.tar and classes.json
# KEY=VALUE: keys of every run's config. NPROC_PER_NODE: ranks (1). What docs/measurements.md has was made by
#   NPROC_PER_NODE=2 OMP_NUM_THREADS=1 bash launch/label_efficiency.sh SHARDS OUT train.compile=true train.precision=bf16
# Two to eight hours on 2 cores. Every run goes on where it stopped: the same command continues.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up run
cd "$ROOT"
shards=${1:?a folder with train/*.tar, test/*.tar and classes.json} out=${2:-runs/label_efficiency} keys=("${@:3}")
train="data.train=$shards/train/*.tar" test="data.validation=$shards/test/*.tar"
frozen=(train.freeze=-1 optimizer.weight_decay=0 augment.mixup=0 augment.rand_augment=null model.drop_path_rate=0)
export NPROC_PER_NODE=${NPROC_PER_NODE:-1}

run() { # VERB CONFIG BATCH NAME [KEY=VALUE ...]
    local verb=$1 config=$2 batch=$3 name=$4
    shift 4
    bash launch/torchrun.sh "$verb" "configs/$config.yaml" run.dir="$out" run.name="$name" "$train" \
        train.micro_batch=$((batch / NPROC_PER_NODE)) "$@" "${keys[@]}" ||
        fail "$name ended with code $?; the same command goes on" 3
}

pretrained() { # NAME [KEY=VALUE ...]
    run pretrain cifar10_mae 256 "$@"
}

tuned() { # NAME FRACTION SEED EPOCHS [KEY=VALUE ...]
    local name=$1 fraction=$2 seed=$3 epochs=$4
    shift 4
    run finetune cifar10_finetune 128 "$name-$fraction-$seed" "$test" data.fraction="$fraction" run.seed="$seed" \
        train.epochs="$epochs" "$@"
}

rows() { # FRACTION EPOCHS SEEDS: the three ways at a share of the labels
    local seed
    for seed in $3; do
        tuned scratch "$1" "$seed" "$2" optimizer.layer_decay=1
        tuned mae "$1" "$seed" "$2" model.init_from="$out/mae/model"
    done
    for seed in $3; do
        tuned probe "$1" "$seed" "$2" model.init_from="$out/mae/model" "${frozen[@]}"
    done
}

pretrained mae
rows 0.01 100 "0 1 2"
rows 0.1 30 "0 1 2"
rows 1 3 0
pretrained simmim objective.name=simmim train.epochs=4
tuned simmim 0.01 0 100 model.init_from="$out/simmim/model"
# With all labels, since it has seen them all.
pretrained multitask objective.name=multitask train.epochs=3 model.num_labels=10
tuned multitask 1 0 3 model.init_from="$out/multitask/model" "${frozen[@]}"
"$PYTHON" - "$out" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

scores = {}
for summary in Path(sys.argv[1]).glob("*-*-*/summary.json"):
    kind, fraction, _ = summary.parent.name.split("-")
    row = json.loads((summary.parent / "validation.json").read_text())["scores"]
    scores.setdefault((float(fraction), kind), []).append(100 * row["validation/top1"])
print("| labels | how | top-1 of 10,000 | runs |\n|---|---|---|---|")
for (fraction, kind), values in sorted(scores.items()):
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    print(f"| {100 * fraction:g} % | {kind} | {statistics.mean(values):.1f}{deviation} | {len(values)} |")
PYTHON
