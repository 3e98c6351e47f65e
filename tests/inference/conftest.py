"""A small classifier in a folder, and photographs in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from sklearn.datasets import load_sample_image

from tests.data.makers import encoded
from tests.models.shapes import tiny
from vitscale.interop.pretrained import save_model
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.vit import ViTPreTrainedModel

LABELS = {0: "tower", 1: "rose, pink", 2: "admiral", 3: "crème"}


def save(folder: Path, model_class: type[ViTPreTrainedModel] = ViTForImageClassification, **keys: Any) -> Path:
    """A model whose outputs differ well between images, saved."""
    if model_class is ViTForImageClassification:
        keys = {"id2label": LABELS} | keys
    model = tiny(model_class, **{"image_size": 32, "patch_size": 8} | keys)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "norm" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    channels = model.config.num_channels
    save_model(folder, model_class.__name__, model.config, model.state_dict(), (0.5,) * channels, (0.25,) * channels)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Real JPEGs: two side by side, one of them lying on its side by EXIF, one further below."""
    folder = tmp_path / "photos"
    (folder / "below" / "deeper").mkdir(parents=True)
    (folder / "china.jpg").write_bytes(encoded(load_sample_image("china.jpg"), quality=90))
    (folder / "flower.JPEG").write_bytes(encoded(load_sample_image("flower.jpg"), orientation=6, quality=90))
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    (folder / "below" / "deeper" / "hopper.jpg").write_bytes(hopper.read_bytes())
    return folder


@pytest.fixture
def bad_files(photos: Path) -> dict[str, str]:
    """Bad files among the photographs: path -> what is to be said of it."""
    whole = (photos / "china.jpg").read_bytes()
    contents = {
        "a_empty.jpg": (b"", "0 bytes"),
        "b_text.jpg": (b"Dear all, the photos are on the other disk.\n", "image"),
        "d_cut.jpg": (whole[: len(whole) // 2], "cut"),
        "e_page.png": (b"<html>404</html>", "a text, not an image"),
    }
    for name, (data, _) in contents.items():
        (photos / name).write_bytes(data)
    return {str(photos / name): said for name, (_, said) in contents.items()}
