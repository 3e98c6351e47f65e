"""Stage i: launch/label_efficiency.sh's comparison at a size for a GPU: a ViT-Ti of patch 4 on CIFAR-10, once each.

It needs a folder with train/*.tar, test/*.tar and classes.json: CIFAR10=FOLDER of launch/gpu_suite.sh.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting
from vitscale.bench.gpu_suite.pretraining import run_command
from vitscale.files.atomic import replaced

CONFIGS = Path(__file__).parents[3] / "configs"
# Share of the labels -> epochs over them, images a step.
SHARES = {0.01: (200, 128), 0.1: (60, 256), 1.0: (30, 512)}
VIT_TI = "model={hidden_size: 192, num_hidden_layers: 12, num_attention_heads: 3, intermediate_size: 768}"
PRETRAIN = ("train={epochs: 150, global_batch: 1024, micro_batch: 1024, precision: bf16, compile: true}",
            "objective.mae={decoder_hidden_size: 192, decoder_num_attention_heads: 3, decoder_intermediate_size: 768}",
            "optimizer.lr=2e-3")  # fmt: skip
TINY = "model={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}"
TINY_PRETRAIN = ("train={epochs: 1, global_batch: 256, micro_batch: 256}",)


def cases(setting: Setting) -> Cases:
    shares = (0.1,) if setting.tiny else SHARES
    tuned = {
        f"{how}, {share:.0%} of the labels": partial(_finetune, how, share, setting)
        for share in shares
        for how in ("scratch", "pretrained")
    }
    return {"pretrain": partial(_pretrain, setting), **tuned}


def _pretrain(setting: Setting) -> Figures:
    sizes = (TINY, *TINY_PRETRAIN) if setting.tiny else (VIT_TI, *PRETRAIN)
    run = _run("pretrain", "cifar10_mae", "mae", sizes, setting)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = statistics.median(row["images_per_second"] for row in rows)
    decoder = json.loads((run / "summary.json").read_text(encoding="utf-8"))["decoder"]
    with replaced(_model(setting)) as draft:
        shutil.copytree(run / "model", draft, dirs_exist_ok=True)
    shutil.rmtree(run)
    samples, loss = rows[-1]["samples"], rows[-1]["loss"]
    return {"samples": samples, "loss": loss, "images_per_second": rate, "decoder": decoder,
            "text": f"{samples} images, {rate:.0f} a second, loss {loss:.4f}"}  # fmt: skip


def _finetune(how: str, share: float, setting: Setting) -> Figures:
    if how == "pretrained" and not _model(setting).exists():
        raise Mismatch("the case `pretrain` has left no model")
    start = f"model.init_from={_model(setting)}" if how == "pretrained" else "optimizer.layer_decay=1"
    if setting.tiny:
        sizes = [TINY, "train={epochs: 1, global_batch: 32, micro_batch: 32}"]
    else:
        epochs, batch = SHARES[share]
        sizes = [VIT_TI, f"train={{epochs: {epochs}, global_batch: {batch}, micro_batch: {batch}, precision: bf16}}"]
    keys = [*sizes, start, f"data.validation={setting.images}/test/*.tar", f"data.fraction={share}"]
    run = _run("finetune", "cifar10_finetune", f"{how}-{share}", keys, setting)
    scores = json.loads((run / "validation.json").read_text(encoding="utf-8"))["scores"]
    shutil.rmtree(run)
    return {"scores": scores, "text": f"top-1 {scores['validation/top1']:.2%} of the test images"}


def _run(verb: str, config: str, name: str, keys: Sequence[str], setting: Setting) -> Path:
    """The folder of a run that has ended."""
    folder = setting.scratch / "few_labels"
    where = (f"run.dir={folder}", f"run.name={name}", f"data.train={setting.images}/train/*.tar")
    if code := run_command([verb, str(CONFIGS / f"{config}.yaml"), *keys, *where], setting):
        raise Mismatch(f"vitscale {verb} ended with {code}; log.txt has what it printed")
    return folder / name


def _model(setting: Setting) -> Path:
    """What was pretrained, beside the results: a later call fine-tunes it."""
    return setting.out / "few_labels_model"
