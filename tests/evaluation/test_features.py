"""Features of real encoders."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vitscale.errors import ConfigError
from vitscale.evaluation.features import extract, pixels, pooled
from vitscale.models.auto import initialize
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 8, "patch_size": 2, "num_channels": 1}


def mae() -> ViTMAEForPreTraining:
    decoder = {"decoder_hidden_size": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **decoder, decoder_num_hidden_layers=1))
    initialize(model, 0)
    return model


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


Batches = Iterator[tuple[torch.Tensor, np.ndarray, np.ndarray]]


def in_batches(values: torch.Tensor, order: list[int], size: int) -> Batches:
    """Batches whose arrays are written over when the next is asked for, as the loader's are."""
    for start in range(0, len(order), size):
        ids = np.array(order[start : start + size])
        pixel_values, labels, sample_ids = values[ids], ids % 3, ids + 100
        yield pixel_values, labels, sample_ids
        pixel_values.zero_()
        labels[:], sample_ids[:] = -7, -7


def test_mean_and_cls_of_an_mae_see_every_patch() -> None:
    model, values = mae(), images(5)
    encoders = {"mean": pooled(model.vit), "cls": pooled(model.vit, "cls")}
    features = extract(encoders, in_batches(values, list(range(5)), 5))
    with torch.no_grad():
        tokens = model.vit(values).last_hidden_state
    assert tokens.shape == (5, 1 + 16, 16)
    np.testing.assert_allclose(features.values["mean"], tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features.values["cls"], tokens[:, 0], rtol=1e-5, atol=1e-6)


def test_each_sample_counts_once_in_order_of_its_id() -> None:
    """The last batch is padded by samples seen before, and ranks see them in any order."""
    values = images(7)
    features = extract({"pixels": pixels()}, in_batches(values, [3, 1, 0, 2, 6, 5, 4, 3, 1], 3))
    assert features.sample_ids.tolist() == list(range(100, 107))
    assert features.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert np.array_equal(features.values["pixels"], values.flatten(1).numpy())


def test_batch_size_does_not_matter() -> None:
    encoder, values = pooled(mae().vit), images(9)
    one, all_at_once = (extract({"x": encoder}, in_batches(values, list(range(9)), size)) for size in (1, 9))
    np.testing.assert_allclose(one.values["x"], all_at_once.values["x"], rtol=1e-4, atol=1e-5)


def test_encoder_is_in_evaluation_mode() -> None:
    model = ViTModel(ViTMAEConfig(**SIZES, drop_path_rate=0.9), add_pooling_layer=False).train()
    pooled(model)
    assert not any(module.training for module in model.modules())


def test_large_pixels_are_averaged_down() -> None:
    values = torch.arange(2 * 3 * 64 * 64, dtype=torch.float32).view(2, 3, 64, 64)
    small = pixels(side=32)(values)
    assert small.shape == (2, 3 * 32 * 32)
    assert small[0, 0] == values[0, 0, :2, :2].mean()


def test_unknown_pool_is_named() -> None:
    with pytest.raises(ConfigError, match="pool='max': must be mean"):
        pooled(mae().vit, "max")
