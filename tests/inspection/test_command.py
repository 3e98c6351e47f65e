"""`vitscale inspect` as a user calls it, on a saved model and a real photograph."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.models.shapes import tiny
from vitscale import cli
from vitscale.interop.pretrained import save_model
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTPreTrainedModel


def saved(folder: Path, model_class: type[ViTPreTrainedModel], **keys: object) -> str:
    model = tiny(model_class, **keys)
    channels = model.config.num_channels
    save_model(folder, model_class.__name__, model.config, model.state_dict(), [0.5] * channels, [0.5] * channels)
    return str(folder)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "china.jpg"
    Image.fromarray(load_sample_image("china.jpg")).save(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), ViTForImageClassification)


def test_prints_the_tree(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("layers.0-2 (each of 3)" in line for line in lines)
    parameters = sum(each.numel() for each in tiny(ViTForImageClassification).parameters())
    assert lines[-1].startswith(f"{parameters:,} parameters; of one image: ")
    assert cli.main(["inspect", model, "--depth", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_gradients_of_given_images(
    model: str, photograph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", model, "--gradients"]) == 0
    random = capsys.readouterr().out
    options = ["--images", photograph, "--labels", "3", "--out", str(tmp_path)]
    assert cli.main(["inspect", model, "--gradients", *options]) == 0
    given = capsys.readouterr().out.splitlines()
    assert random.splitlines()[-1] != given[-2]
    pattern = str(Path(photograph).parent / "*.jpg")
    assert cli.main(["inspect", model, "--gradients", "--images", pattern, "--labels", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == given[:-1], "as the other verbs name images"
    assert given[-1] == str(tmp_path / "gradients.png")
    with Image.open(given[-1]) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("channels, size", [(3, 16), (1, (8, 16))])
def test_attention_over_a_photograph(
    channels: int, size: int, photograph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", ViTMAEForPreTraining, num_channels=channels, image_size=size)
    assert cli.main(["inspect", folder, "--attention", photograph, "--out", str(tmp_path / "seen")]) == 0
    path = tmp_path / "seen" / "china-attention.png"
    assert capsys.readouterr().out.strip() == str(path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"


BAD = {
    "no model": (["nowhere/at/all"], "nowhere/at/all"),
    "a depth of gradients": (["MODEL", "--gradients", "--depth", "0"], "--depth 0: is for the tree"),
    "a depth of attention": (["MODEL", "--attention", "IMAGE", "--depth", "1"], "--depth 1: is for the tree"),
    "a folder for the tree": (["MODEL", "--out", "looks"], "--out looks: is for --gradients and --attention"),
    "labels without gradients": (["MODEL", "--labels", "1"], "for --gradients"),
    "too few labels": (["MODEL", "--gradients", "--labels", "1"], "one an image"),
    "no such class": (["MODEL", "--gradients", "--images", "IMAGE", "--labels", "5"], "must be classes 0 to 4"),
    "no such image": (["MODEL", "--attention", "none.jpg"], "none.jpg"),
    "a bad one of many": (["MODEL", "--gradients", "--images", "IMAGE", "EMPTY"], "empty.jpg: 0 bytes; leave it out"),
    "too large a one of many": (["MODEL", "--gradients", "--images", "IMAGE", "--max-pixels", "99"], "than 99 pixels"),
    "too large an image": (["MODEL", "--attention", "IMAGE", "--max-pixels", "273279"], "raise --max-pixels"),
    "several images": (["MODEL", "--attention", "FOLDER"], "is 2 images; name one"),
    "no images": (["MODEL", "--gradients", "--images", "none/*.jpg"], "--images"),
    "no folder": (["MODEL", "--gradients", "--out", "EMPTY"], "--out"),
    "an empty image": (["MODEL", "--attention", "EMPTY"], "empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, model: str, photograph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jpg").touch()
    names = {"MODEL": model, "IMAGE": photograph, "EMPTY": str(tmp_path / "empty.jpg"), "FOLDER": str(tmp_path)}
    (tmp_path / "other.png").touch()
    arguments, told = BAD[case]
    assert cli.main(["inspect", *(names.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert "\n" not in error
