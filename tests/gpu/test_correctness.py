"""The core of the GPU suite, one test a case: gradients, ZeRO and resuming against the CPU in fp32."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitscale import world
from vitscale.bench.gpu_suite import correctness
from vitscale.bench.gpu_suite.cases import Setting

pytestmark = pytest.mark.gpu


def setting(folder: Path) -> Setting:
    far = time.monotonic() + 3600
    return Setting("cuda", folder, folder, far, frozenset(), {}, folder / "lines.jsonl")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A single rank's; taken away again for the tests that start processes, as torch's modes are for all others."""
    before = dict(os.environ)
    world.enter()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", correctness.cases(setting(Path())))
def test_against_the_cpu(name: str, tmp_path: Path) -> None:
    correctness.cases(setting(tmp_path))[name]()


@pytest.mark.parametrize("name", ["ZeRO-0 deterministic", "ZeRO-2 deterministic"])
def test_resume_is_bit_identical(name: str, tmp_path: Path) -> None:
    assert correctness.resume_cases(setting(tmp_path))[name]()["equal"]
