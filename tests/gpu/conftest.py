"""What tests on a GPU leave as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    """A run in bf16 lets fp32 products be rounded, which other tests are not to see."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
