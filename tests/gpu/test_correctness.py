"""The core of the GPU suite, one test a case: gradients, ZeRO and resuming against the CPU in fp32."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vitscale.bench.gpu_suite import correctness
from vitscale.bench.gpu_suite.cases import Setting

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_rank")]


def setting(folder: Path) -> Setting:
    far = time.monotonic() + 3600
    return Setting("cuda", folder, folder, far, frozenset(), {}, folder / "lines.jsonl")


@pytest.mark.parametrize("name", correctness.cases(setting(Path())))
def test_against_the_cpu(name: str, tmp_path: Path) -> None:
    correctness.cases(setting(tmp_path))[name]()


@pytest.mark.parametrize("name", ["ZeRO-0 deterministic", "ZeRO-2 deterministic"])
def test_resume_is_bit_identical(name: str, tmp_path: Path) -> None:
    assert correctness.resume_cases(setting(tmp_path))[name]()["equal"]
