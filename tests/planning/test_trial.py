"""A trial's figure beside the plan's, and what a trial does that has no room."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from tests.integration.test_auto import large
from vitscale.config.step import with_step
from vitscale.planning.memory import activations
from vitscale.planning.trial import trial

CPU = torch.device("cpu")


def test_it_takes_about_what_was_planned() -> None:
    """Of a process's RAM, in which there are kernels' own memory and code too."""
    config = with_step(large(), 0, 64)
    took = trial(config, CPU, 10**10)
    assert took is not None
    assert 0.9 < took / activations(config, "cpu").of(64).peak < 2


def without_room() -> None:
    config, limits = with_step(large(), 0, 64), resource.getrlimit(resource.RLIMIT_AS)
    trial(with_step(config, 0, 1), CPU, 10**10)
    before = psutil.Process().memory_info().rss
    assert trial(config, CPU, 50_000_000) is None
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert psutil.Process().memory_info().rss - before < 30_000_000


def test_without_room_it_says_so_and_leaves_nothing() -> None:
    """In a new process: in this one there may be room that it has mapped and does not use."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(without_room).result()


def test_another_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        trial(with_step(large(), 0, 1), torch.device("meta"), 10**10)
