"""Stage g: where five steps of MAE ViT-B go, reader to AdamW: a trace, the top kernels, the GPU's idle share, and
whether the next batch is made beside the step."""

from __future__ import annotations

import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vitscale.augment.feed import DeviceFeed
from vitscale.augment.pipeline import Augment
from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting
from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import LR
from vitscale.bench.measuring import synchronize
from vitscale.bench.photographs import open_loader
from vitscale.config.presets import preset
from vitscale.config.schema import Model, Objective, Parallel, RunConfig, Train
from vitscale.engine.backend import Backend
from vitscale.engine.engine import Inputs
from vitscale.models.auto import new_model
from vitscale.world import World

STEPS, WARM = 5, 4
MOST_BYTES = 16 << 20
ZERO_STAGES = (0, 2)
FEED = "feed"  # what of the host's time, by its name in the trace, is the next batch's
Span = tuple[float, float]  # start and end, in the trace's microseconds


def cases(setting: Setting) -> Cases:
    return {f"ZeRO-{stage}": partial(_profile, stage, setting) for stage in ZERO_STAGES}


def _config(setting: Setting) -> RunConfig:
    if setting.tiny:
        config = small_config("mae")
        return replace(config, model=replace(config.model, image_size=32, patch_size=8))
    train = Train(global_batch=256, micro_batch=256, steps=STEPS, precision="bf16", compile=True)
    return RunConfig(model=Model(**preset("B"), image_size=224), objective=Objective(name="mae"), train=train)


def _profile(stage: int, setting: Setting) -> Figures:
    cuda = setting.device == "cuda"
    config = replace(_config(setting), parallel=Parallel(zero_stage=stage))
    folder = setting.photographs()  # by forks, so before there is anything on a GPU
    backend = Backend(config, World(device=setting.device))
    try:
        engine = backend.wrap(new_model(config, config.run.seed), config)
        augment = Augment.of(config, setting.device, train=True)
        with open_loader(folder, config) as loader, DeviceFeed(loader, augment, backend.device) as feed:
            for _ in range(WARM):
                engine.step(_micro_batch(feed), LR)
            synchronize(backend.device)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            with profile(activities=activities) as profiler:
                began = time.perf_counter()
                for _ in range(STEPS):
                    engine.step(_micro_batch(feed), LR)
                synchronize(backend.device)
                elapsed = time.perf_counter() - began
    finally:
        backend.close()
    top = _top(profiler, cuda)
    figures: Figures = {"top": top, **_trace(profiler, setting, f"trace-zero{stage}.json.gz")}
    first = ", ".join(f"{one['name'][:40]} {one['share']:.0%}" for one in top[:3])
    if cuda:
        if not top:
            raise Mismatch("the profiler saw nothing on the GPU")
        kernels = (event.time_range for event in profiler.events() if _is_kernel(event))
        figures["idle_share"] = idle_share((span.start, span.end) for span in kernels)
        figures["step_ms"] = 1000 * elapsed / STEPS
        beside = "nothing of the feed's in the trace"
        if "feed_total_ms" in figures:
            feed_ms = figures["feed_total_ms"] / STEPS
            beside = f"feed {feed_ms:.1f} ms, {figures['feed_overlap']:.0%} of it beside the step's kernels"
        first = f"{figures['step_ms']:.1f} ms a step, GPU idle {figures['idle_share']:.1%}, {beside}; {first}"
    figures["text"] = f"{first}; {figures['trace']}"
    return figures


def _micro_batch(feed: DeviceFeed[Any]) -> Iterator[Inputs]:
    """One, and the next one started on once the engine has queued its backward, as in a run."""
    yield _fed(feed)
    with record_function(FEED):
        feed.run_ahead()


def _fed(feed: DeviceFeed[Any]) -> Inputs:
    with record_function(FEED):
        return next(feed).inputs


def _trace(profiler: Any, setting: Setting, name: str) -> Figures:
    """What the trace says of the feed; the trace is kept for ui.perfetto.dev, unless it is too large for OUT."""
    file = setting.out / name
    profiler.export_chrome_trace(str(file))
    figures: Figures = {"trace_bytes": file.stat().st_size}
    mebibytes = figures["trace_bytes"] / 2**20
    figures["trace"] = f"{name}, {mebibytes:.1f} MiB"
    with gzip.open(file) as stream:
        figures |= feed_overlap(json.load(stream)["traceEvents"])
    if figures["trace_bytes"] > MOST_BYTES:
        file.unlink()
        figures["trace"] = f"the trace of {mebibytes:.0f} MiB was not kept: at most {MOST_BYTES >> 20}"
    return figures


def feed_overlap(events: Iterable[dict[str, Any]]) -> Figures:
    """From a trace's events: `feed_total_ms`, how long the GPU was at what the feed started, and `feed_overlap`, the
    share of it during which the stream that computes was at work too; nothing where the feed started nothing.

    What started something tells whose it is: a call of CUDA's within a range named FEED, on the same thread. The stream
    that computes is the one with the most time of all that is not the feed's.
    """
    ranges: dict[Any, list[Span]] = defaultdict(list)  # of the feed, by thread
    calls: dict[Any, tuple[Any, float]] = {}  # of CUDA, by what they and their kernels are numbered with
    work: list[tuple[Any, Any, Span]] = []  # its number, its stream, when it ran
    for event in events:
        kind, arguments = event.get("cat"), event.get("args", {})
        if kind == "user_annotation" and event["name"] == FEED:
            ranges[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif kind in ("cuda_runtime", "cuda_driver"):
            calls[arguments.get("correlation")] = event["tid"], event["ts"]
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            span = event["ts"], event["ts"] + event["dur"]
            work.append((arguments.get("correlation"), arguments["stream"], span))
    feeds: list[Span] = []
    others: dict[Any, list[Span]] = defaultdict(list)
    for number, stream, span in work:
        thread, began = calls.get(number, (None, 0.0))
        own = any(start <= began <= end for start, end in ranges[thread])
        (feeds if own else others[stream]).append(span)
    total = covered(feeds)
    computing = max(others.values(), key=covered, default=[])
    both = total + covered(computing) - covered([*feeds, *computing])
    return {"feed_total_ms": total / 1000, "feed_overlap": both / total} if total else {}


def _top(profiler: Any, cuda: bool) -> list[Figures]:
    """The 15 kernels (on a CPU: operations) that took the most time of their own."""
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = [event for event in profiler.key_averages() if not cuda or _is_kernel(event)]
    total = sum(getattr(event, kind) for event in averages) or 1
    averages.sort(key=lambda event: -getattr(event, kind))
    return [
        {"name": event.key[:120], "calls": event.count, "milliseconds": getattr(event, kind) / 1000,
         "share": getattr(event, kind) / total}
        for event in averages[:15]
    ]  # fmt: skip


def _is_kernel(event: Any) -> bool:
    """Of the GPU, and no range that only names what kernels are for."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def idle_share(spans: Iterable[Span]) -> float:
    """The share of the time between the first start and the last end in which no span is."""
    found = list(spans)
    whole = max((end for _, end in found), default=0.0) - min((start for start, _ in found), default=0.0)
    return 1.0 - covered(found) / whole if whole else 0.0


def covered(spans: Iterable[Span]) -> float:
    """How long there is at least one of them."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
