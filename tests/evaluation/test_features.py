"""Features of real encoders, and the tables that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.evaluation.tables import CPU, table
from vitscale.evaluation.features import FeatureTable, of_vit, pixels
from vitscale.models.auto import initialize
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 8, "patch_size": 2, "num_channels": 1}


@torch.no_grad()
def test_mean_and_cls_of_an_mae_see_every_patch() -> None:
    decoder = {"decoder_hidden_size": 8, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **decoder, decoder_num_hidden_layers=1)).eval()
    initialize(model, 0)
    values = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    features, tokens = of_vit(model.vit)(values), model.vit(values).last_hidden_state
    assert tokens.shape == (5, 1 + 16, 16)
    torch.testing.assert_close(features["mean"], tokens[:, 1:].mean(1))
    torch.testing.assert_close(features["cls"], tokens[:, 0])


def test_large_pixels_are_averaged_down() -> None:
    values = torch.arange(2 * 3 * 64 * 64, dtype=torch.float32).view(2, 3, 64, 64)
    small = pixels(values, most=3 * 32 * 32)["pixels"]
    assert small.shape == (2, 3 * 32 * 32)
    assert small[0, 0] == values[0, 0, :2, :2].mean()
    assert pixels(values)["pixels"].shape == (2, 3 * 18 * 18)
    assert torch.equal(pixels(values[:, :1, :32, :32])["pixels"], values[:, :1, :32, :32].flatten(1))


def test_a_table_gives_back_what_it_was_given_and_leaves_no_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float16)
    made = table(tmp_path, np.arange(7) * 2, first=100, mean=values, cls=-values)
    assert list(tmp_path.iterdir()) == []
    assert isinstance(made.rows("mean").base, np.memmap)
    assert made.poolings == ("mean", "cls")
    assert made.ids.tolist() == list(range(100, 107))
    assert made.labels.tolist() == list(range(0, 14, 2))
    assert np.array_equal(made.rows("cls", np.array([1, 3])), -values[[1, 3]])
    parts = list(made.chunks("mean", CPU, size=3))
    assert [len(range(*rows.indices(7))) for rows, _ in parts] == [3, 3, 1]
    assert np.array_equal(torch.cat([part for _, part in parts]).numpy(), values.astype(np.float32))


def test_what_float16_cannot_hold_is_its_largest(tmp_path: Path) -> None:
    made = FeatureTable(tmp_path, 1)
    made.append(np.array([0]), np.array([0]), {"x": torch.tensor([[1e9, -1e9]])})
    assert made.rows("x").tolist() == [[65504.0, -65504.0]]
