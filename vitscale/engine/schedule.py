"""The learning rate as a pure function of the step, so that nothing of it needs saving."""

from __future__ import annotations

import math

from vitscale.config.schema import RunConfig


def peak_lr(config: RunConfig) -> float:
    """The schedule's peak: `optimizer.lr` grown to the global batch (linear scaling, Goyal et al. 2017)."""
    return config.optimizer.lr * _scale(config)


def lr_at(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of step `step` (0-based) of `total_steps`: linear warm-up, then half a cosine."""
    peak, floor = peak_lr(config), config.optimizer.min_lr * _scale(config)
    warmup = round(config.optimizer.warmup * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, total_steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _scale(config: RunConfig) -> float:
    per = config.optimizer.lr_batch
    return 1.0 if per is None else config.train.global_batch / per
