"""Stage c: `vitscale pretrain` as a user starts it, from JPEGs in shards, at every ZeRO stage."""

from __future__ import annotations

import json
import runpy
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting, Unable, start_process
from vitscale.bench.measuring import peak_rate
from vitscale.config.load import load_config
from vitscale.models.auto import build_model

STAGES = (0, 2, 1, 3)
GRAPHED = " by CUDA graphs"
STEPS, WARM = 60, 20  # rates are of the steps after WARM: compiling, the first reads
AGREE, AGREE_REL = 5, 0.01  # so many first losses, within this: from ZeRO-1 on bf16 rounds the weights
RECIPE = Path(__file__).parents[3] / "configs" / "pretrain_vit_b_mae.yaml"
SIZES = (f"train={{global_batch: 256, micro_batch: 256, steps: {STEPS}, compile: true}}",)
TINY = ("model={preset: null, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, "
        "image_size: 32, patch_size: 8}",
        "objective.mae={decoder_hidden_size: 16, decoder_num_hidden_layers: 1, decoder_num_attention_heads: 2, "
        "decoder_intermediate_size: 32}",
        "train={global_batch: 16, micro_batch: 16, steps: 12, compile: false}")  # fmt: skip


def cases(setting: Setting) -> Cases:
    losses = {name: figures["losses"] for name, figures in setting.earlier.get("c", {}).items()}
    runs = {f"ZeRO-{stage}": partial(_pretrain, stage, False, losses, setting) for stage in STAGES}
    graphed = {f"ZeRO-{stage}{GRAPHED}": partial(_pretrain, stage, True, losses, setting) for stage in (0, 2)}
    return runs | graphed


def _pretrain(stage: int, graphs: bool, losses: dict[str, list[float]], setting: Setting) -> Figures:
    """One run to its end, and what its files say of it; its losses are to agree with those of the others."""
    if graphs and setting.tiny:
        raise Unable("there are no CUDA graphs on a CPU")
    name = f"ZeRO-{stage}{GRAPHED if graphs else ''}"
    keys = [
        f"data={{train: ['{setting.photographs()}/*.tar'], lanes: 8, window: 16384}}",
        *(TINY if setting.tiny else SIZES),
        f"run.dir={setting.scratch}/runs",
        "log.every_steps=1",
        "tracking.mlflow=false",
        f"parallel.zero_stage={stage}",
        f"train.cuda_graphs={str(graphs).lower()}",
        f"run.name={name.replace(' ', '-')}",
    ]
    run = setting.scratch / "runs" / name.replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    if code := run_command(["pretrain", str(RECIPE), *keys], setting):
        raise Mismatch(f"vitscale pretrain ended with {code}; log.txt has what it printed")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(run)
    figures = _figures(rows, summary, keys, setting)
    setting.note(figures)
    _agree(name, figures["losses"], losses)
    figures["agrees_with"] = list(losses)
    losses[name] = figures["losses"]
    return figures


def run_command(arguments: Sequence[str], setting: Setting) -> int | None:
    """The exit code of `vitscale ARGUMENTS` in a process of its own."""
    process = start_process(setting.device, _command, arguments)
    process.join()
    return process.exitcode


def _command(arguments: Sequence[str]) -> None:
    """Be `python -m vitscale.cli ARGUMENTS`."""
    sys.argv = ["vitscale", *arguments]
    runpy.run_module("vitscale.cli", run_name="__main__", alter_sys=True)


def _figures(rows: Sequence[dict[str, Any]], summary: dict[str, Any], keys: Sequence[str], setting: Setting) -> Figures:
    config = load_config(str(RECIPE), keys)
    with torch.device("meta"):
        flops = build_model(config).flops_per_image()
    warm = rows[WARM if len(rows) > WARM else len(rows) // 2 :]
    seconds = [row["step_seconds"] for row in warm]
    rate = config.train.global_batch * len(seconds) / sum(seconds)  # not of the median step: a stall counts
    peak, source = _peak(setting)
    names = [name for name in ("data_share", "augment_share") if name in warm[0]]
    shares: Figures = {name: statistics.fmean(row[name] for row in warm) for name in names}
    figures = shares | {
        "images_per_second": rate,
        "utilization": rate * flops / peak,
        "peak": f"{peak / 1e12:.1f} TFLOP/s, {source}",
        "step_seconds_median": statistics.median(seconds),
        "peak_memory_gib": max(summary["peak_memory_bytes"]) / 2**30,
        "losses": [row["loss"] for row in rows],
        "decoder": summary["decoder"],
        "skipped_steps": summary["skipped_steps"],
        "bad_samples": summary["bad_samples"],
    }
    spent = ", ".join(f"{name.removesuffix('_share')} {share:.1%}" for name, share in shares.items())
    figures["text"] = (f"{rate:.0f} images/s, {figures['utilization']:.1%} of peak, {spent} of the time, "
                       f"{figures['peak_memory_gib']:.1f} GiB")  # fmt: skip
    return figures


def _peak(setting: Setting) -> tuple[float, str]:
    if setting.measured_tflops is not None:
        return setting.measured_tflops * 1e12, "stage a's matrix product"
    if setting.tiny:
        torch.set_num_threads(1)  # the next run is a fork, and OpenMP's threads hang in one
    return peak_rate(torch.device(setting.device), torch.bfloat16)


def _agree(name: str, losses: Sequence[float], earlier: Mapping[str, Sequence[float]]) -> None:
    """Compare the first losses with those of the stages that have run before."""
    for other, expected in earlier.items():
        for step, (loss, value) in enumerate(zip(losses[:AGREE], expected, strict=False)):
            if not abs(loss - value) <= AGREE_REL * abs(value):
                raise Mismatch(f"{name}: the loss of step {step + 1} is {loss:.5f}, that of {other} {value:.5f}; "
                               f"more than {AGREE_REL:.0%} apart")  # fmt: skip
