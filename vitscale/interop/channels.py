"""The patch projection of a model for images of another number of channels."""

from __future__ import annotations

from torch import Tensor

from vitscale.errors import ConfigError


def adapt_channels(weight: Tensor, num_channels: int) -> Tensor:
    """A patch projection [width, channels, height, width of a patch] for `num_channels`; the dtype stays.

    The rule is timm's (adapt_input_conv): for one channel the sum over all, so that a grey picture gives
    what it gave as equal channels; for n the channels in turn (RGBRG...), times channels / n, so that
    equal channels give tokens of the same size. ConfigError for less than one.
    """
    if num_channels < 1:
        raise ConfigError(f"num_channels={num_channels}: must be 1 or more")
    channels = weight.shape[1]
    if num_channels == channels:
        return weight
    full = weight.float()  # sums of halves would round
    if num_channels == 1:
        return full.sum(dim=1, keepdim=True).to(weight.dtype)
    rounds = -(-num_channels // channels)
    repeated = full.repeat(1, rounds, 1, 1)[:, :num_channels]
    return (repeated * (channels / num_channels)).to(weight.dtype)
