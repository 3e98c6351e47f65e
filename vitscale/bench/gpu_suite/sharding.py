"""Stage k: `vitscale bench sharding` at the sizes that a GPU is for, a contender a case."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from vitscale.bench.gpu_suite.cases import Cases, Figures, Mismatch, Setting
from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.sharding import DDP, FSDP2, config_of, in_megabytes, measured, problem, utilization
from vitscale.config.schema import Parallel, RunConfig
from vitscale.world import World

BATCHES = {"B": 256, "L": 128, "H": 64, "g": 32}  # images a step
FIRST, OTHERS = (DDP, "ZeRO-2"), (FSDP2, "ZeRO-3", "ZeRO-1")  # of worth
AGAIN = ("B", "L", "H")  # with gradient checkpointing too: of what is planned, so without FSDP2
STEPS = 20


def cases(setting: Setting) -> Cases:
    """DDP and ZeRO-2 of B, L and H, with gradient checkpointing too; selective; then the others, and the largest."""
    here, known = World(device=setting.device), dict(setting.earlier.get("k", {}))

    def of(size: str, again: bool | str, names: Iterable[str]) -> dict[str, Callable[[], Figures]]:
        config = tiny_config() if setting.tiny else config_of(size, "mae", BATCHES[size], here, True, again)
        title = f"{size}, {'gradient' if again is True else again} checkpointing" if again else size
        return {f"{title} {name}": partial(_measure, title, name, config, known, setting) for name in names}

    if setting.tiny:
        return of("tiny", False, (*FIRST, FSDP2))
    order = [
        *(of(size, again, FIRST) for size in AGAIN for again in (False, True)),
        *(of(size, "selective", FIRST[:1]) for size in AGAIN),
        *(of(size, False, OTHERS) for size in AGAIN),
        of("g", False, (*FIRST, *OTHERS)),
        *(of(size, True, OTHERS[1:]) for size in AGAIN),
    ]
    return {name: case for each in order for name, case in each.items()}


def tiny_config() -> RunConfig:
    """Of the rehearsal."""
    config = small_config("mae")
    train = replace(config.train, precision="bf16")
    return replace(config, train=train, parallel=Parallel(bucket_elements=50_000))


def _measure(size: str, name: str, config: RunConfig, known: dict[str, Figures], setting: Setting) -> Figures:
    """One contender; its first loss is to agree with DDP's of the same size, and its speed is seen against that."""
    figures = measured(name, config, 2 if setting.tiny else STEPS, World(device=setting.device))
    ddp = known.get(f"{size} {DDP}", {})
    why = problem(figures, ddp.get("losses", [None])[0])
    if why is None:
        figures |= in_megabytes(figures)
        figures["images_per_second"] = rate = config.train.global_batch / figures["seconds"]
        figures["utilization"] = utilization(config, rate, setting.measured_tflops)
        figures["ratio"] = ddp["seconds"] / figures["seconds"] if "seconds" in ddp else None
    if why is not None and not figures.get("out_of_memory"):
        setting.note(figures)
        raise Mismatch(why)
    figures["text"] = _text(figures) if why is None else why
    known[f"{size} {name}"] = figures
    return figures


def _text(figures: Figures) -> str:
    texts = {
        "images_per_second": "{:.1f} images/s",
        "utilization": "{:.1%} of peak",
        "allocated_mb": "{:,.0f} MB",
        "reserved_mb": "{:,.0f} MB reserved",
        "accuracy": "planned: {:.3f} of what was allocated",
        "ratio": "{:.2f} of DDP's speed",
    }
    return ", ".join(text.format(figures[name]) for name, text in texts.items() if figures[name] is not None)
