"""What fine-tuning takes from whatever it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.files.web import served, status
from tests.inference.conftest import save
from vitscale.config.schema import Source
from vitscale.conversion.convert import convert
from vitscale.errors import ConfigError, StorageError
from vitscale.files import retry
from vitscale.models.vit import ViTModel
from vitscale.run.finetune import complete

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")


@pytest.mark.parametrize("kind", ["hf", "timm"])
def test_sizes_and_normalization_of_any_folder(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path / "hf", num_attention_heads=2)
    if kind == "timm":
        convert(folder, tmp_path / "timm", "timm")
        folder = tmp_path / "timm"
    keys = complete({"model.init_from": str(folder), "model.num_labels": 4})
    expected = complete({"model.init_from": str(tmp_path / "hf"), "model.num_labels": 4})
    for name in SIZES:
        assert keys[f"model.{name}"] == expected[f"model.{name}"]
    assert keys["augment.mean"] == expected["augment.mean"] == (0.5, 0.5, 0.5)
    assert keys["augment.std"] == (0.25, 0.25, 0.25)
    assert keys["model.position_embeddings"] == "learned"
    assert not keys.keys() & {"model.num_labels", "model.id2label", "evaluation.crop_fraction"}, (
        "of the data, not of it"
    )


def test_a_file_of_weights_says_its_sizes_and_the_config_the_rest(tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", ViTModel)
    from vitscale.interop.pretrained import load_model

    torch.save({"model": load_model(folder).state_dict()}, tmp_path / "encoder.pth")
    written = {"model.init_from": str(tmp_path / "encoder.pth"), "model.num_labels": 4}
    with pytest.raises(ConfigError, match="num_attention_heads"):
        complete(written)
    keys = complete(written | {"model.num_attention_heads": 2, "model.image_size": 64})
    assert (keys["model.hidden_size"], keys["model.image_size"]) == (load_model(folder).config.hidden_size, 32)


def test_classes_at_a_server_are_waited_for_as_long_as_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.02)
    with served() as web:
        web.files["/d/classes.json"], web.faults["/d/classes.json"] = b"[]", [status(503)] * 500
        written = {"data.train": (Source(f"{web.url}/d/a.tar"),), "data.patience_s": 0.1}
        with pytest.raises(StorageError, match=r"/d/classes\.json: its storage failed"):
            complete(written)
        assert web.faults["/d/classes.json"], "before it answered"
