"""`vitscale features`, as it is typed: the values, the shards, and going on where it stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.makers import photo
from tests.inference.conftest import save
from vitscale.cli import main
from vitscale.inference import images
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import load_model
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOPPED

BAD = (0, 4, 5, 12)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Thirteen files, four of them bad, the first and the last too."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(13):
        (folder / f"{number:02}.jpg").write_bytes(b"" if number in BAD else photo(number))
    return folder


def features(*arguments: str | Path | int) -> int:
    return main(["features", *map(str, arguments)])


def shards(folder: Path) -> list[tuple[np.ndarray, list[str]]]:
    """As docs say to read them."""
    content = json.loads((folder / "features.json").read_text())
    assert content["complete"]
    found = []
    for row in content["shards"]:
        path = folder / row["file"]
        names = json.loads(path.with_name(f"{path.stem}.names.json").read_text(encoding="utf-8"))["names"]
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            assert table["name"].to_pylist() == names
            assert json.loads(table.schema.metadata[b"shape"]) == content["shape"]
            flat = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            values = flat.reshape(-1, *content["shape"])
        else:
            values = np.load(path, allow_pickle=False)
        assert values.dtype == np.float32
        assert list(values.shape) == [row["images"], *content["shape"]] == [len(names), *content["shape"]]
        found.append((values, names))
    return found


def expected(model: Path, names: list[str], pool: str) -> np.ndarray:
    """One image after the other, by the model's own call."""
    loaded, processor = load_model(model), ViTImageProcessor.from_pretrained(model)
    encoder = loaded if isinstance(loaded, ViTModel) else loaded.get_submodule("vit")
    rows = []
    for name in names:
        with torch.no_grad():
            tokens = encoder(**processor(name, return_tensors="pt")).last_hidden_state[0]
        patches = tokens[-loaded.config.num_patches :]
        rows.append({"cls": tokens[0], "mean": patches.mean(0), "patch": patches}[pool].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
@pytest.mark.parametrize("pool", ["cls", "mean", "patch"])
def test_values(
    classifier: Path, many: Path, tmp_path: Path, pool: str, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = features(classifier, many, "--out", out, "--pool", pool, "--format", file_format, "--shard-size", 4,
                    "--batch", 3)  # fmt: skip
    captured = capsys.readouterr()
    assert code == FAILED
    assert captured.out == f"{out}: features of 9 images in 3 shards\n"
    assert captured.err.count("skipped: 0 bytes") == len(BAD)
    found = shards(out)
    assert [len(names) for _, names in found] == [4, 4, 1]
    names = [name for _, part in found for name in part]
    assert names == [str(many / f"{number:02}.jpg") for number in range(13) if number not in BAD]
    assert np.abs(np.concatenate([values for values, _ in found]) - expected(classifier, names, pool)).max() < 1e-5
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("model_class", "keys"),
    [
        (ViTModel, {"num_channels": 1}),
        (ViTMAEForPreTraining, {"image_size": (16, 24)}),
        (ViTForMaskedImageModeling, {"encoder_stride": 8}),
        (ViTForMultitaskPreTraining, {"encoder_stride": 8}),
        (ViTForImageClassification, {"id2label": None, "num_labels": 0}),
        (ViTForImageClassification, {"num_register_tokens": 3, "layer_scale_init_value": 0.1}),
        (ViTForImageClassification, {"use_cls_token": False, "pooling": "mean"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_model_with_an_encoder(model_class: Any, keys: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "model", model_class, **keys)
    assert features(model, photos, "--out", tmp_path / "out", "--pool", "mean") == DONE
    ((values, names),) = shards(tmp_path / "out")
    assert len(names) == 3
    assert np.abs(values - expected(model, names, "mean")).max() < 1e-5


def test_without_a_class_token(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model", use_cls_token=False, pooling="mean")
    assert features(model, photos, "--out", tmp_path / "out") == BAD_INPUT
    assert "take mean or patch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_norm_behind_the_pooling_counts(photos: Path, tmp_path: Path) -> None:
    """What the classifier sees, as num_labels=0 would give it."""
    model = save(tmp_path / "model", pooling="mean", fc_norm=True)
    assert features(model, photos, "--out", tmp_path / "out", "--pool", "mean") == DONE
    ((values, names),) = shards(tmp_path / "out")
    loaded = load_model(model)
    loaded.classifier = torch.nn.Identity()
    with torch.no_grad():
        seen = loaded(**ViTImageProcessor.from_pretrained(model)(names, return_tensors="pt")).logits
    assert np.abs(values - seen.numpy()).max() < 1e-5


class Interrupted(BaseException):
    """Stands for whatever ends a process in the middle."""


def interrupted_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = images._read, 0

    def read(*arguments: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Interrupted
        return real(*arguments)

    monkeypatch.setattr(images, "_read", read)


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
@pytest.mark.parametrize("at", [1, 6, 9, 13])
def test_interrupted_and_run_again(
    classifier: Path, many: Path, tmp_path: Path, file_format: str, at: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The same files as without the interruption, and nothing that is done is done again."""
    options = ("--format", file_format, "--shard-size", 2, "--batch", 1)
    assert features(classifier, many, "--out", tmp_path / "whole", *options) == FAILED
    whole = capsys.readouterr()
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupted_at(at, patched)
        with pytest.raises(Interrupted):
            features(classifier, many, "--out", out, *options)
    capsys.readouterr()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.names.json")}
    assert not list(out.glob("*.tmp"))
    assert not json.loads((out / "features.json").read_text())["complete"]
    assert features(classifier, many, "--out", out, *options) == FAILED
    of_earlier = r" \(when its shard was written; delete features-\d+\.names\.json to read it again\)"
    assert re.sub(of_earlier, "", capsys.readouterr().err) == whole.err
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for (values, names), (others, other_names) in zip(shards(out), shards(tmp_path / "whole"), strict=True):
        assert names == other_names
        assert np.array_equal(values, others)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert features(classifier, many, "--out", out, *options) == FAILED
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_ctrl_c_is_one_line(
    classifier: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*arguments: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(images, "_read", read)
        assert features(classifier, many, "--out", tmp_path / "out") == STOPPED
    assert capsys.readouterr().err.startswith("stopped; the same command goes on")
    assert features(classifier, many, "--out", tmp_path / "out") == FAILED


def test_a_killed_shard_is_written_again(classifier: Path, many: Path, tmp_path: Path) -> None:
    """Killed between a shard's data and its names, and in the middle of the next."""
    out = tmp_path / "out"
    options = ("--shard-size", 3, "--out", out)
    features(classifier, many, *options)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "features-00001.names.json").unlink()
    (out / "features-00002.npy").rename(out / ".features-00002.npy.tmp")
    (out / "features-00001.npy").write_bytes(b"half")
    assert features(classifier, many, *options) == FAILED
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    (out / "features-00001.npy").unlink()
    assert features(classifier, many, *options) == FAILED
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_more_images_are_added(classifier: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert features(classifier, many / "0[1-3].jpg", "--out", out, "--shard-size", 2) == DONE
    assert features(classifier, many / "0[1-3].jpg", many / "06.jpg", "--out", out, "--shard-size", 2) == DONE
    assert [len(names) for _, names in shards(out)] == [2, 1, 1]


def test_going_on_with_something_else_is_refused(
    classifier: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = (many / "01.jpg", many / "02.jpg", "--out", out)
    assert features(classifier, *first) == DONE
    other = save(tmp_path / "other", layer_norm_eps=1e-3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    capsys.readouterr()
    for arguments, said in (
        ((classifier, *first, "--pool", "mean"), "another pool (cls there, mean now)"),
        ((classifier, *first, "--format", "parquet"), "file_format"),
        ((classifier, *first, "--shard-size", 1), "shard_size"),
        ((other, *first), "another config"),
        ((classifier, many / "02.jpg", "--out", out), "01.jpg where the input now has"),
        ((classifier, many / "01.jpg", "--out", out), "nothing more"),
        ((classifier, many, "--out", tmp_path / "full"), "not empty"),
        ((classifier, many, "--out", tmp_path / "file"), "cannot be used"),
    ):
        assert features(*arguments) == BAD_INPUT
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    assert [len(names) for _, names in shards(out)] == [2]
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["thesis.txt"]


@pytest.mark.parametrize("name, content, says", [
    ("features.json", "[]", "features.json: holds a list, not a mapping; name a new folder"),
    ("features.json", '{"format": "vits', "features.json: cannot be read as JSON"),
    ("features-00001.names.json", '{"names": ["/data/0', "delete it to have its shard made again"),
    ("features-00001.names.json", '{"names": []}', "features-00001.names.json is damaged"),
    ("features-00001.names.json", '{"names": [], "skipped": [{"place": "1"}]}', "is damaged"),
    ("features-00001.names.json", '{"names": [], "skipped": [{"place": 7, "name": "x", "reason": ""}]}', "has x where"),
])  # fmt: skip
def test_damaged_records_are_one_line(
    name: str, content: str, says: str, classifier: Path, many: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    options = (classifier, many, "--out", out, "--shard-size", 3)
    assert features(*options) == FAILED
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / name).write_text(content)
    capsys.readouterr()
    assert features(*options) == BAD_INPUT
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"vitscale: error: --out {out}: ")
    assert says in err
    if "delete it" in err:
        (out / name).unlink()
        assert features(*options) == FAILED
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_nothing_to_read(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert features(classifier, tmp_path / "gone.jpg", "--out", tmp_path / "out") == BAD_INPUT
    assert "no image could be read" in capsys.readouterr().err
    assert shards(tmp_path / "out") == []


def test_a_shard_holds_what_fits(classifier: Path, many: Path, tmp_path: Path) -> None:
    """A default by bytes: 16 patches of 16 numbers of 4 bytes."""
    features(classifier, many, "--out", tmp_path / "out", "--pool", "patch")
    assert json.loads((tmp_path / "out" / "features.json").read_text())["shard_size"] == (256 << 20) // (16 * 16 * 4)
