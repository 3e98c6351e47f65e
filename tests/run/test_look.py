"""`vitscale look` shows what a run of several ranks feeds its model, and what its objective hides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.makers import encoded, pixels, write_shards, write_tar
from vitscale.augment.pipeline import Augment
from vitscale.cli import main
from vitscale.config.load import config_of
from vitscale.config.schema import RunConfig, Source
from vitscale.data.index import open_index
from vitscale.evaluation.figures import draw_sheet, seen
from vitscale.models.auto import new_model
from vitscale.run.look import hidden_patches, images_of_step, raw_samples
from vitscale.run.training_data import order_over, training_loader
from vitscale.world import World

SMALL = [
    "model.image_size=32", "model.patch_size=8", "model.hidden_size=32", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.intermediate_size=32", "model.num_labels=10", "train.global_batch=16",
    "train.micro_batch=8", "train.steps=9", "objective.mae.decoder_hidden_size=32",
    "objective.mae.decoder_num_hidden_layers=1",
    "objective.mae.decoder_num_attention_heads=2", "objective.mae.decoder_intermediate_size=32",
]  # fmt: skip


def small(pattern: str, *keys: str) -> RunConfig:
    return config_of({"data.train": (Source(pattern),)}, [*SMALL, *keys])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [30, 20])
    return f"{folder}/*.tar"


def test_it_shows_the_images_of_a_run_on_two_ranks(shards: str, tmp_path: Path) -> None:
    config = small(shards, "objective.name=classification", "augment.preset=deit3", "train.micro_batch=4")
    sheet = images_of_step(config, 5, 12, World())
    index = open_index(config.data.train, None, tmp_path)
    pictures, names = [], []
    for rank in range(2):
        world = World(rank=rank, world_size=2)
        with training_loader(config, index, order_over(config, index, None), world, 4 * 16) as loader:
            for _ in range(2):
                batch = next(loader)
                inputs = Augment.of(config, "cpu", train=True)(batch).inputs()
                shown = seen(inputs["pixel_values"], config.augment.mean, config.augment.std)
                pictures += list(shown.permute(0, 2, 3, 1).numpy())
                names += batch.names
                loader.release(batch)
    assert [caption.split("\n")[0] for caption in sheet.captions] == names[:12]
    assert list(sheet.panels) == ["augmented"]
    np.testing.assert_array_equal(sheet.panels["augmented"], pictures[:12])
    assert all(" of " in caption for caption in sheet.captions), "mixed labels"


@pytest.mark.parametrize("objective", ["mae", "simmim", "multitask"])
def test_what_is_hidden_is_what_the_model_hides(shards: str, objective: str) -> None:
    config = small(shards, f"objective.name={objective}")
    sheet = images_of_step(config, 1, 8, World())
    keys = torch.arange(8) * 7919
    inputs: dict[str, Any] = {"labels": torch.zeros(8, dtype=torch.int64)} if objective == "multitask" else {}
    output = new_model(config, 0)(pixel_values=torch.zeros(8, 3, 32, 32), sample_key=keys, **inputs)
    theirs = output.mask > 0 if objective == "mae" else output.bool_masked_pos
    hidden = hidden_patches(config, keys)
    assert hidden is not None
    assert torch.equal(hidden, theirs.view(8, -1))
    share = np.isnan(sheet.panels["left to see"]).mean()
    assert share == pytest.approx(hidden.float().mean().item()), "of the pixels, as of the patches"
    assert not np.isnan(sheet.panels["augmented"]).any()


def test_classification_hides_nothing(shards: str) -> None:
    config = small(shards, "objective.name=classification")
    assert list(images_of_step(config, 1, 3, World()).panels) == ["augmented"]
    assert images_of_step(config, 1, 3, World()).captions[0].split("\n")[1].startswith("label ")


def test_an_open_micro_batch_shows_the_same_images(shards: str) -> None:
    by_run, by_hand = (
        images_of_step(small(shards, "objective.name=classification", "augment.preset=deit3", key), 2, 12, World())
        for key in ("train.micro_batch=auto", "train.micro_batch=4")
    )
    assert by_run.captions == by_hand.captions
    np.testing.assert_array_equal(by_run.panels["augmented"], by_hand.panels["augmented"])


def test_raw_samples_with_keys_labels_and_what_is_wrong(tmp_path: Path) -> None:
    large = encoded(pixels(1, 700, 900), "PNG")
    write_tar(tmp_path / "s.tar", [("a.png", large), ("a.cls", b"3"), ("long" * 20 + ".jpg", b"none")])
    sheet = raw_samples(small(f"{tmp_path}/s.tar"), 9)
    assert sheet.captions[0] == "s/a\n900 x 700\nlabel 3"
    name, *reason = sheet.captions[1].split("\n")
    assert name == "s/long…" + ("long" * 20)[-19:]
    assert reason[0].startswith("undecodable: ")
    image, blank = sheet.panels["image"]
    assert max(image.shape) == 320, "made smaller"
    assert (blank == 1).all()


def test_a_sheet_of_any_shapes_is_drawn(tmp_path: Path) -> None:
    images = [np.full((4 + n, 9 - n, 1 if n % 2 else 3), n / 10) for n in range(9)]
    draw_sheet({"one": images, "two": images}, ["$a_{b\nc"] * 9, tmp_path / "sheet.png", "nine")
    with Image.open(tmp_path / "sheet.png") as sheet:
        width, height = sheet.size
    assert width > 1500
    assert height > 800, "two lines of two images"


def test_the_verb(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "look.png"
    assert main(["look", shards, "--images", "3", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    both = [f"{Path(shards).parent}/s{number:03d}.tar" for number in range(2)]
    assert main(["look", *both, "run.seed=0", "--images", "3", "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes() == out.read_bytes(), "several patterns are one set"
    config = tmp_path / "run.yaml"
    config.write_text(f"data:\n  train: {shards}\n")
    assert main(["look", str(config), *SMALL, "--step", "2", "--images", "3", "--out", str(tmp_path / "2.png")]) == 0
    assert (tmp_path / "2.png").read_bytes() != out.read_bytes()
    assert not (tmp_path / "runs").exists()
    for wrong in (
        ["--step", "2", "--out", str(out)],
        ["--out", "look.jpg"],
        ["--out", "/nowhere/look.png"],
        ["--images", "300", "--out", str(out)],
    ):
        capsys.readouterr()
        assert main(["look", shards, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["look", str(config), shards, "--out", str(out)]) == 2
    assert "a config stands alone" in capsys.readouterr().err
