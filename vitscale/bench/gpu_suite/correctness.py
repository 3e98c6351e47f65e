"""Stages b and e: what a GPU computes against the CPU in fp32, at every ZeRO stage; stop and resume bit for bit."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting, Unable
from vitscale.bench.gpu_suite.training import Training, gradient_distances, gradients, reference, update_distance
from vitscale.bench.measuring import synchronize
from vitscale.config.presets import preset
from vitscale.config.schema import MAE, OBJECTIVES, Model, Objective, Optimizer, Parallel, RunConfig, SimMIM, Train
from vitscale.world import World, local_device

# Against the CPU in fp32, relative: the loss, all gradients together, that of any one parameter (a layer norm's bias
# gets what is left of sums that nearly cancel). TF32 would not pass for fp32. bf16 on a CPU: 2e-4, 0.05, 0.4.
TOLERANCES = {torch.float32: (1e-5, 1e-4, 1e-2), torch.bfloat16: (2e-3, 0.08, 0.7)}
# SimMIM's loss is the absolute difference: where that is nearly 0, the last bit decides its gradient's sign.
OF_SIGNS = 1e-3
# Of four steps: the losses, and the way that the weights went. AdamW's first steps are nearly sign(gradient), so a
# gradient that should be 0 (a key's bias) goes where its noise is. Weights that stay where they are would be 1 off.
STEP_TOLERANCES = {"fp32": (1e-4, 0.1), "bf16": (2e-3, 0.3)}
STEPS, SAVED_AT = 4, 2
LossAndGradients = tuple[float, dict[str, torch.Tensor]]


def cases(setting: Setting) -> Cases:
    """b: gradients by objective, then steps, saving and resuming by ZeRO stage."""
    device = torch.device(setting.device)
    of_objectives = {f"gradients {name}": partial(_compare_gradients, name, device) for name in OBJECTIVES}
    of_stages = {f"ZeRO-{stage}": partial(_compare_steps, stage, setting) for stage in (0, 1, 2, 3)}
    return {**of_objectives, **of_stages, "gradients compiled": partial(_compare_gradients, "mae", device, True)}


def resume_cases(setting: Setting) -> Cases:
    """e: ViT-S with 197 tokens."""
    return {
        f"ZeRO-{stage}{suffix}": partial(_compare_resumed, stage, bool(suffix), setting)
        for stage in (0, 2)
        for suffix in (" deterministic", "")
    }


def small_config(objective: str, tokens: bool = False) -> RunConfig:
    """A small model and batch; with `tokens`, ViT-S's width and its 197 tokens in four blocks."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                             "intermediate_size": 64, "image_size": 16, "patch_size": 4}  # fmt: skip
    decoder = MAE(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                  decoder_intermediate_size=32)  # fmt: skip
    if tokens:
        sizes, decoder = preset("S") | {"num_hidden_layers": 4, "image_size": 224}, MAE()
    return RunConfig(
        model=Model(**sizes, num_labels=10, drop_path_rate=0.1),
        objective=Objective(name=objective, mae=decoder, simmim=SimMIM(mask_patch=1)),
        optimizer=Optimizer(clip=1.0),
        train=Train(global_batch=8, micro_batch=8, steps=STEPS),
    )


def _compare_gradients(objective: str, device: torch.device, compiled: bool = False) -> Figures:
    """fp32, then bf16, both against fp32 on the CPU, or bf16 of compiled blocks; raises Mismatch beyond TOLERANCES."""
    if compiled and device.type == "cpu":
        raise Unable("compiling is for a GPU here; on a CPU, tests/models/test_compile.py does it")
    config = small_config(objective, tokens=device.type == "cuda")
    expected = gradients(config, torch.device("cpu"), torch.float32)
    dtypes = [torch.bfloat16] if compiled else list(TOLERANCES)
    computed = {dtype: gradients(config, device, dtype, compiled) for dtype in dtypes}
    return _judge(computed, expected, OF_SIGNS if objective == "simmim" else 0.0)


def _judge(computed: dict[torch.dtype, LossAndGradients], expected: LossAndGradients, least: float = 0.0) -> Figures:
    """The distances by dtype; raises Mismatch beyond TOLERANCES, of all gradients together at least `least`."""
    figures: Figures = {}
    expected_loss, expected_gradients = expected
    for dtype, (loss, of_dtype) in computed.items():
        name = str(dtype).removeprefix("torch.")
        of_loss = abs(loss - expected_loss) / abs(expected_loss)
        total, largest, worst = gradient_distances(of_dtype, expected_gradients)
        figures[name] = {"loss": loss, "loss_distance": of_loss, "gradient_distance": total, "largest": largest,
                         "worst": worst}  # fmt: skip
        limit_of_loss, limit_of_total, limit_of_one = TOLERANCES[dtype]
        limits = (limit_of_loss, max(limit_of_total, least), limit_of_one)
        if not all(value <= limit for value, limit in zip((of_loss, total, largest), limits, strict=True)):
            raise Mismatch(
                f"{name}: loss {loss:.6g} for {expected_loss:.6g}; {of_loss:.1e}, gradients {total:.1e}, that of "
                f"{worst} {largest:.1e} off; at most {', '.join(f'{limit:g}' for limit in limits)}"
            )
    figures["text"] = "; ".join(
        f"{name}: loss {one['loss_distance']:.0e}, gradients {one['gradient_distance']:.0e} off"
        for name, one in figures.items()
    )
    return figures


def _compare_steps(stage: int, setting: Setting) -> Figures:
    """Steps in fp32 and bf16 against plain torch on the CPU, then saved and resumed in bf16."""
    figures: Figures = {}
    for precision, (most_of_losses, most_of_update) in STEP_TOLERANCES.items():
        config = _staged(small_config("multitask"), stage, precision)
        losses, start, end = reference(config, STEPS)
        with Training(config, _world()) as training:
            computed = training.steps(0, STEPS)
            distance = update_distance(training.weights(), end, start)
        of_losses = max(abs(loss - value) / abs(value) for loss, value in zip(computed, losses, strict=True))
        figures[precision] = {"losses": computed, "reference": losses, "loss_distance": of_losses,
                              "update_distance": distance}  # fmt: skip
        if not (of_losses <= most_of_losses and distance <= most_of_update):
            raise Mismatch(
                f"{precision}: losses {of_losses:.1e} off (at most {most_of_losses:g}), the weights' way "
                f"{distance:.1e} (at most {most_of_update:g}) after {STEPS} steps"
            )
    resumed = compare_resumed(_staged(small_config("multitask"), stage, "bf16"), setting.scratch / "small")
    if not resumed["equal"]:
        raise Mismatch(f"resumed at step {SAVED_AT}, {resumed['text']}")
    fp32, bf16 = (figures[name]["loss_distance"] for name in STEP_TOLERANCES)
    return {**figures, "resumed": resumed, "text": f"losses {fp32:.0e} off in fp32, {bf16:.0e} in bf16; resumed bit "
                                                   "for bit"}  # fmt: skip


def _staged(config: RunConfig, stage: int, precision: str) -> RunConfig:
    """At a ZeRO stage, in two micro-batches but where ZeRO-1 refuses them."""
    micro = config.train.global_batch // (1 if stage == 1 else 2)
    train = replace(config.train, precision=precision, micro_batch=micro)
    return replace(config, parallel=Parallel(zero_stage=stage), train=train)


def _compare_resumed(stage: int, deterministic: bool, setting: Setting) -> Figures:
    """At a real size; without deterministic algorithms other bits are a finding, not a failure."""
    config = small_config("multitask")
    sizes = config.model if setting.tiny else Model(**preset("S"), num_labels=10, drop_path_rate=0.1)
    count = 8 if setting.tiny else 64
    train = Train(global_batch=count, micro_batch=count, steps=STEPS, precision="bf16", compile=not setting.tiny,
                  deterministic=deterministic)  # fmt: skip
    config = replace(config, model=sizes, objective=Objective(name="multitask"), train=train,
                     parallel=Parallel(zero_stage=stage))  # fmt: skip
    figures = compare_resumed(config, setting.scratch / "resumed")
    if deterministic and not figures["equal"]:
        raise Mismatch(f"with deterministic algorithms, {figures['text']}")
    return figures


def compare_resumed(config: RunConfig, folder: Path) -> Figures:
    """Train, save half-way, go on; then go on from the checkpoint: whether losses and weights are the same bits."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.compiler.reset()  # what other cases have compiled counts against torch's limit of variants
    with Training(config, _world()) as unbroken:
        before = unbroken.steps(0, SAVED_AT)
        checkpoint = unbroken.save(folder, SAVED_AT)
        synchronize(unbroken.backend.device)
        began = time.perf_counter()
        losses = unbroken.steps(SAVED_AT, STEPS)
        seconds = (time.perf_counter() - began) / len(losses)
        weights = unbroken.weights()
    with Training(config, _world(), checkpoint) as resumed:
        again = resumed.steps(SAVED_AT, STEPS)
        differing = [name for name, values in resumed.weights().items() if values.tobytes() != weights[name].tobytes()]
    shutil.rmtree(folder)
    equal = losses == again and not differing
    bits = f"other bits in {len(differing)} of {len(weights)} parameters, losses {again} for {losses}"
    return {
        "equal": equal,
        "losses": before + losses,
        "resumed": again,
        "differing": len(differing),
        "step_seconds": seconds,
        "text": f"{'the same bits' if equal else bits}; {seconds * 1000:.1f} ms a step",
    }


def _world() -> World:
    """A single process's, on the device that the environment shows."""
    return World(device=local_device())
