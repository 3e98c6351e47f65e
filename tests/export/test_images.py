"""Real images with their labels, from folders and from shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.makers import write_shards, write_tar
from tests.export.small import small, write_pictures
from vitscale.errors import DataError
from vitscale.export.images import BATCH, Images
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.models.configuration import ViTConfig

PROCESSOR = ViTImageProcessor(size=32, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25))


def images(*named: Path, config: ViTConfig | None = None, **options: Any) -> Images:
    return Images([str(each) for each in named], "--images", PROCESSOR, config or small().config, **options)


def test_the_limit_on_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path, 2)
    with pytest.raises(DataError, match="--images: no image could be read"):
        list(images(tmp_path, max_pixels=10))
    assert "raise --max-pixels" in capsys.readouterr().err


def labels_of(found: Images) -> list[int]:
    return [label for _, labels in found for label in labels.tolist()]  # type: ignore[union-attr]


def test_batches_as_the_model_wants_them(tmp_path: Path) -> None:
    write_pictures(tmp_path, BATCH + 3)
    found = images(tmp_path)
    first, second = found
    assert (first[0].shape, second[0].shape) == ((BATCH, 3, 32, 32), (3, 3, 32, 32))
    assert first[1] is None
    assert len(found) == BATCH + 3
    again = next(iter(found))[0]
    assert torch.equal(first[0], again), "every pass reads them again"


def test_labels_of_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path, 10)
    assert labels_of(images(tmp_path, labelled=True)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    names = {f"class{number}": 4 - number for number in range(5)}
    named = small(label2id=names).config
    assert labels_of(images(tmp_path, labelled=True, config=named)) == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert labels_of(images(tmp_path / "class3", labelled=True, config=named)) == [1, 1], "by name, not by place"
    with pytest.raises(DataError, match=r"--images: the images lie in 1 folders \(class3"):
        images(tmp_path / "class3", labelled=True)


def test_labels_of_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4])  # labels 0 to 6
    ten = small(num_labels=10).config
    assert labels_of(images(tmp_path, labelled=True, config=ten)) == [0, 1, 2, 3, 4, 5, 6]
    assert labels_of(images(tmp_path / "s001.tar", labelled=True, config=ten)) == [3, 4, 5, 6]
    with pytest.raises(DataError, match=r"s001.tar:000005: its label \(.cls\) is 5; .*below num_labels=5"):
        labels_of(images(tmp_path, labelled=True))
    label2id = {name: 9 - place for place, name in enumerate("abcdefghij")}
    named = ViTConfig.from_dict(small().config.to_dict() | {"label2id": label2id})
    (tmp_path / "classes.json").write_text('["a", "b", "c", "d", "e", "f", "g"]', encoding="utf-8")
    assert labels_of(images(tmp_path, labelled=True, config=named)) == [9, 8, 7, 6, 5, 4, 3], "by name"
    assert labels_of(images(tmp_path, labelled=True, config=ten)) == [0, 1, 2, 3, 4, 5, 6], "the model has no names"
    (tmp_path / "classes.json").write_text('["a", "b", "other", "d", "e"]', encoding="utf-8")
    with pytest.raises(DataError, match=r"calls label 2 'other', which is none of the model's label2id"):
        labels_of(images(tmp_path, labelled=True, config=named))
    (tmp_path / "classes.json").unlink()
    (tmp_path / "bare").mkdir()
    write_shards(tmp_path / "bare", [2], labels=False)
    with pytest.raises(DataError, match="is missing"):
        labels_of(images(tmp_path / "bare", labelled=True))


def test_labels_whatever_the_files_are_called(tmp_path: Path) -> None:
    """Shards in capitals; a file, a folder and a shard of no use are no classes."""
    write_pictures(tmp_path / "pictures", 5)
    write_shards(tmp_path, [2])
    shard = (tmp_path / "s000.tar").rename(tmp_path / "UPPER.TAR")
    (tmp_path / "cut.tar").write_bytes(b"cut")
    (tmp_path / "empty").mkdir()
    useless = (tmp_path / "cut.tar", tmp_path / "empty", tmp_path / "nowhere.png")
    assert labels_of(images(tmp_path / "pictures", shard, *useless, labelled=True)) == [0, 1, 2, 3, 4, 0, 1]


def test_some_of_many_are_spread_evenly(tmp_path: Path) -> None:
    write_pictures(tmp_path, 20)
    assert labels_of(images(tmp_path, labelled=True, most=5)) == [0, 1, 2, 3, 4]
    assert len(images(tmp_path, most=100)) == 20


def test_bad_files_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path, 5)
    (tmp_path / "class2" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = images(tmp_path, labelled=True)
    assert labels_of(found) == labels_of(found) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.count("bad.png: skipped") == 1


def test_nothing_good_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar", [("a.jpg", b"no")])
    with pytest.raises(DataError, match="--images: no image could be read"):
        list(images(tmp_path / "empty.tar"))
    with pytest.raises(DataError, match=r"no image could be read \(.*nowhere: cannot be read: No such file or dir"):
        images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="--images -: images are read more than once"):
        images(Path("-"))
