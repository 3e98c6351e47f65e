"""Activations are transformers' of the same names."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from vitscale.models.activations import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_same_function(name: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.randn(1000)])
    ours, theirs = ACTIVATIONS[name]()(x), ACT2FN[name](x)
    # gelu_fast has its constant to ten digits.
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_only_those_with_parameters_are_left_out() -> None:
    with_parameters = {"prelu", "xielu"}
    assert set(ACT2CLS) - with_parameters == set(ACTIVATIONS)
