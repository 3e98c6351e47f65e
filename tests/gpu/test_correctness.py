"""The core of the GPU suite, one test a case: gradients, ZeRO and resuming against the CPU in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bench.gpu_suite.stages import make_setting
from vitscale.bench.gpu_suite import correctness

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_rank")]


@pytest.fixture(autouse=True)
def torch_modes() -> Iterator[None]:
    """As they are for all other tests."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", correctness.cases(make_setting(Path(), "cuda")))
def test_against_the_cpu(name: str, tmp_path: Path) -> None:
    correctness.cases(make_setting(tmp_path, "cuda"))[name]()


@pytest.mark.parametrize("name", ["ZeRO-0 deterministic", "ZeRO-2 deterministic"])
def test_resume_is_bit_identical(name: str, tmp_path: Path) -> None:
    assert correctness.resume_cases(make_setting(tmp_path, "cuda"))[name]()["equal"]
