"""Patch projections for another number of channels."""

from __future__ import annotations

import pytest
import torch

from vitscale.errors import ConfigError
from vitscale.interop.channels import adapt_channels

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 9, 13])
def test_as_timm_does(channels: int, wanted: int, dtype: torch.dtype) -> None:
    weight = torch.randn(8, channels, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = weight.clone()
    found = adapt_channels(weight, wanted)
    assert found.shape == (8, wanted, 4, 6)
    assert found.dtype == dtype
    assert torch.equal(found, timm.models.adapt_input_conv(wanted, weight.clone(), base_chans=channels))
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("wanted", [1, 2, 4, 6, 13])
def test_equal_channels_give_what_they_gave(wanted: int) -> None:
    """Exactly for one channel and for multiples of three; else what the channels' share allows."""
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    picture = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    before = torch.nn.functional.conv2d(picture.expand(-1, 3, -1, -1), weight)
    after = torch.nn.functional.conv2d(picture.expand(-1, wanted, -1, -1), adapt_channels(weight, wanted))
    assert torch.allclose(before, after, atol=1e-5) == (wanted in (1, 6))


def test_no_channel_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_channels=0: must be 1 or more"):
        adapt_channels(torch.zeros(2, 3, 4, 4), 0)
