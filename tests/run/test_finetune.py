"""What fine-tuning takes from whatever it starts from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.data.makers import encoded, pixels, write_tar
from tests.files.web import served, status
from tests.inference.conftest import save
from vitscale.config.load import config_of
from vitscale.config.schema import Model, Objective, RunConfig, Source
from vitscale.conversion.convert import convert
from vitscale.data.index import build_index
from vitscale.data.labels import LabelReader, count_labels
from vitscale.errors import ConfigError, DataError, StorageError
from vitscale.files import retry
from vitscale.interop.loading import start_from
from vitscale.interop.pretrained import load_model
from vitscale.models.vit import ViTModel
from vitscale.run.finetune import Finetune, balanced_weights, complete, require_readable
from vitscale.world import World

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


def look_at(folder: Path, labels: list[str], num_labels: int) -> None:
    """Judge the labels of a shard with these, of so many classes without names."""
    image = encoded(pixels(0, 4, 4), "PNG")
    members = [(f"{i}.{kind}", data) for i, text in enumerate(labels)
               for kind, data in (("png", image), ("cls", text.encode()))]  # fmt: skip
    config = RunConfig(model=Model(num_labels=num_labels), objective=Objective(name="classification"))
    index = build_index([str(write_tar(folder / "a.tar", members))])
    require_readable(config, count_labels(index, "cls", LabelReader.of(config)))


@pytest.mark.parametrize(("classes", "images"), [(2, 4), (100, 300), (1000, 2000)])
@pytest.mark.parametrize("stray", [[], ["x"], ["-1"]])
def test_labels_that_count_from_one_are_refused_however_rare_the_last_class(
    tmp_path: Path, classes: int, images: int, stray: list[str]
) -> None:
    labels = [str(i % classes + 1) for i in range(images)]
    last = images // classes
    with pytest.raises(DataError) as caught:
        look_at(tmp_path, stray + labels, classes)
    assert f"{last + len(stray)} of {images + len(stray)} labels are not what" in str(caught.value)
    hint = f"none is 0 and {last} are {classes}: they count from 1 to {classes}: write them from 0 to {classes - 1}"
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    "labels",
    [["100", *map(str, range(1, 100)), "0"], ["100", "101", *map(str, range(1, 100))], list(map(str, range(1, 100)))],
    ids=["the first class is there", "another is above it", "the last is not there"],
)
def test_a_few_labels_out_of_range_are_bad_samples(tmp_path: Path, labels: list[str]) -> None:
    look_at(tmp_path, labels, 100)
    with pytest.raises(DataError, match=r"4 of \d+ labels .*; mend them, or set data\.label"):
        look_at(tmp_path, [*labels, *["x"] * (4 - sum(int(each) > 99 for each in labels))], 100)


def test_words_without_names_are_told_both_ways_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        look_at(tmp_path, ["dog", "cat", "7"] * 3, 2)
    assert "'dog' is no whole number" in str(caught.value)
    assert str(caught.value).endswith(
        "; give their names: model.id2label=[cat, dog] or a classes.json beside the shards"
    )
    with pytest.raises(DataError, match=r"model\.id2label=\[a0, a1, a2, \.\.\.\] or a classes\.json"):
        look_at(tmp_path, [f"a{i}" for i in range(9)], 9)
    with pytest.raises(DataError, match="; mend them, or set data"):
        look_at(tmp_path, [*"0123" * 3, *["spoilt"] * 5], 4)


def test_balanced_weights_of_uneven_classes() -> None:
    counts = {0: 6, 1: 3, 3: 1}  # class 2 has no image
    weights = balanced_weights(counts, 4)
    assert weights == pytest.approx((10 / 18, 10 / 9, 0, 10 / 3))
    assert sum(weights[each] * count for each, count in counts.items()) / 10 == pytest.approx(1)
    assert balanced_weights({0: 5, 1: 5}, 2) == (1, 1)
    with pytest.raises(DataError, match="too long to be counted; write the weights as a list"):
        balanced_weights({}, 4)


def test_a_new_head_is_drawn_as_asked_for(tmp_path: Path) -> None:
    """The encoder is not, nor a head that the checkpoint has."""
    source = save(tmp_path / "hf", num_attention_heads=2)
    keys = complete({"model.init_from": str(source), "model.num_labels": 4}) | {"objective.name": "classification"}
    overrides = ["data.train=a.tar", "model.num_labels=4", "train.steps=1"]

    def built(*more: str) -> Any:
        config = config_of(keys, [*overrides, *more])
        return Finetune(config, World()).build(SimpleNamespace(config=config), drawn=True)  # type: ignore[arg-type]

    usual, small = built(), built("objective.classification.head_std=2.0e-5")
    torch.testing.assert_close(small.classifier.weight, usual.classifier.weight * 1e-3)
    assert float(small.classifier.weight.detach().std()) == pytest.approx(2e-5, rel=0.2)
    for (name, before), after in zip(usual.vit.named_parameters(), small.vit.parameters(), strict=True):
        assert torch.equal(before, after), name
    start_from(small, source)
    assert torch.equal(small.classifier.weight, load_model(source).classifier.weight)
