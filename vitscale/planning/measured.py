"""A GPU's measured step beside the planned one: what `vitscale bench step --json FILE` wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitscale.config.presets import preset
from vitscale.config.schema import Model, Objective, RunConfig, Train
from vitscale.errors import ConfigError
from vitscale.planning.gpus import Gpu
from vitscale.planning.plan import Cluster, Planner

_CLASSES = 1000  # of the benchmark's models


def calibration(file: Path, config: RunConfig, gpu: Gpu) -> dict[str, Any]:
    """What was measured, on what, and its `ratio` to the plan of the same step on `gpu`.

    ConfigError for a file that has no step of the config's precision and of its way to run a block.
    """
    train = config.train
    row = f"vitscale {'by CUDA graphs' if train.cuda_graphs else 'compiled' if train.compile else 'eager'}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["bench"] != "step":
            raise ValueError(f"it is of `vitscale bench {found['bench']}`")
        rows = {name: each["median_ms"] / 1000 for name, each in found["contenders"].items()}
        about = {key: found[key] for key in ("objective", "preset", "batch", "precision", "device")}
        measured = Train(precision=about["precision"], compile=train.compile, cuda_graphs=train.cuda_graphs,
                         micro_batch=about["batch"], global_batch=about["batch"], steps=1)  # fmt: skip
        model = Model(preset=about["preset"], num_labels=_CLASSES, **preset(about["preset"]))
        run = RunConfig(model=model, objective=Objective(name=about["objective"]), train=measured)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--measured {file}: must be what `vitscale bench step --json FILE` writes ({wrong})"
        ) from None
    options = f"--precision {train.precision}{' --compile' * train.compile}"
    again = f"measure it by `vitscale bench step {options} --json FILE`"
    if about["precision"] != train.precision:
        wrong = f"is of {about['precision']}, and train.precision={train.precision}"
        raise ConfigError(f"--measured {file}: {wrong}; {again}, or set the key")
    if row not in rows:
        keys = f"train.compile={str(train.compile).lower()} train.cuda_graphs={str(train.cuda_graphs).lower()}"
        has = ", ".join(name for name in rows if name.startswith("vitscale")) or "none of vitscale's"
        raise ConfigError(f"--measured {file}: has no row '{row}', as {keys} need it (it has {has}); {again}")
    step = Planner(run, Cluster(gpu, 1)).estimate(run).step
    planned = replace(step, augment=0.0).total  # its images stay as they are
    seconds = rows[row]
    return {"file": str(file), **about, "row": row, "seconds": seconds, "planned": planned, "ratio": seconds / planned}
