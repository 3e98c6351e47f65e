"""README.md for the hub: front matter that it takes, and what a run's folder tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.models.shapes import TRAINABLE, tiny
from vitscale.config.load import dump_config, load_config
from vitscale.errors import CheckpointError
from vitscale.interop.model_card import RunRecord, model_card
from vitscale.interop.pretrained import processor_dict
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

SCORES = {"linear_probe": 0.9752, "linear_probe_se": 0.0082, "knn": 0.9421, "knn_se": 0.0123}
SUMMARY: dict[str, Any] = {
    "steps": 900, "samples": 230400, "epochs": 180.0, "loss": 0.1234, "world_size": 2, "device": "cpu",
    "vitscale": "0.1.0", "bad_samples": {"truncated": 3},
    "evaluation": {"train": 1437, "test": 360, "scores": {"trained": SCORES, "pixels": SCORES}},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = load_config("configs/quickstart.yaml", ["data.train=['https://host/{0..9}.tar','b/*.tar']"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    return tmp_path


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("model_class", [ViTModel, *TRAINABLE], ids=lambda c: c.__name__)
def test_without_a_run(model_class: type[ViTPreTrainedModel]) -> None:
    model = tiny(model_class)
    text = model_card(model, "me/some-vit", None, with_processor=False)
    read = ModelCard(text).data
    task = "image-classification" if model_class is ViTForImageClassification else "image-feature-extraction"
    assert read.pipeline_tag == task
    assert read.library_name == ("vitscale" if model_class is ViTForMultitaskPreTraining else "transformers")
    assert read.tags == ["vitscale", "vision", model.config.model_type]
    assert read.license is None
    assert "# some-vit\n" in text
    assert "images of 16x16 pixels and 3 channel(s) in patches of 4x4" in text
    for absent in ("## Recipe", "## Scores", "## Data"):
        assert absent not in text
    config = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert config is not None
    assert json.loads(config[1])["hidden_size"] == 16


def test_a_model_that_transformers_cannot_open() -> None:
    text = model_card(tiny(ViTModel, qk_norm=True), "me/x", None, with_processor=True)
    assert front(text)["library_name"] == "vitscale"
    assert front(text)["tags"][-1] == "vitscale_vit"
    assert "transformers opens it too" not in text


def test_of_a_run(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    text = model_card(tiny(ViTMAEForPreTraining), "me/mae", RunRecord.read(run), with_processor=True)
    for said in (
        "- `https://host/{0..9}.tar`\n- `b/*.tar`",
        "230,400 images seen, about 1,280 an epoch; 3 of them bad and replaced.",
        "| objective | mae |",
        "| steps | 900 |",
        "| images a step | 256 |",
        "| learning rate | 0.0015 |",
        "| ranks and device | 2 x cpu |",
        "| last loss | 0.1234 |",
        "fitted on 1,437 and scored on 360 images",
        "| trained | 97.5 ± 0.8 % | 94.2 ± 1.2 % |",
        "mask_ratio: 0.6",
    ):
        assert said in text, said
    assert "mlflow" not in text  # where it was tracked is nobody's business
    assert "1,437 images" not in text
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"images": 1437}))
    assert "images seen, of 1,437;" in model_card(tiny(ViTModel), "a/b", RunRecord.read(run), with_processor=True)


def test_of_averaged_weights(run: Path) -> None:
    assert "| weights |" not in model_card(tiny(ViTModel), "a/b", RunRecord.read(run), with_processor=True)
    (run / "config.yaml").write_text(dump_config(load_config("configs/quickstart.yaml", ["train.ema_decay=0.999"])))
    text = model_card(tiny(ViTModel), "a/b", RunRecord.read(run), with_processor=True)
    assert "| weights | their moving average, decay 0.999 |" in text


def test_of_a_run_that_has_not_ended(run: Path, tmp_path: Path) -> None:
    text = model_card(tiny(ViTMAEForPreTraining), "me/mae", RunRecord.read(run), with_processor=True)
    assert "The run has not finished." in text
    assert "## Scores" not in text
    with pytest.raises(CheckpointError, match="is no run's folder"):
        RunRecord.read(tmp_path / "none")


@pytest.mark.parametrize("with_processor", [True, False])
@pytest.mark.parametrize("model_class", [ViTForImageClassification, ViTMAEForPreTraining], ids=lambda c: c.__name__)
def test_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_class: type[ViTPreTrainedModel], with_processor: bool
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    model = tiny(model_class)
    model.save_pretrained("me/vit")
    Path("me/vit/preprocessor_config.json").write_text(json.dumps(processor_dict(model.config, (0.5,), (0.5,))))
    Image.new("RGB", (40, 30), (200, 10, 10)).save("image.jpg")
    text = model_card(model, "me/vit", None, with_processor)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert names["outputs"].shape[0] == 1
