"""`vitscale predict`, as it is typed: labels, formats, bad files, exit codes."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.inference.conftest import LABELS, save
from vitscale.cli import main
from vitscale.conversion.convert import convert
from vitscale.interop.pretrained import load_model
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel
from vitscale.prepare.pack import pack
from vitscale.run_folder import BAD_INPUT, DONE, FAILED

transformers = pytest.importorskip("transformers")


def predict(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def their_probabilities(folder: Path, path: Path) -> dict[str, float]:
    """By transformers' own classes, from the same folder."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with Image.open(path) as image, torch.no_grad():
        turned = ImageOps.exif_transpose(image)
        probabilities = model(**processor(turned, return_tensors="pt")).logits.softmax(-1)[0]
    return {model.config.id2label[i]: float(value) for i, value in enumerate(probabilities)}


def test_the_labels_are_transformers(classifier: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = predict(capsys, classifier, photos, "--format", "jsonl", "--top-k", "99", "--batch", "2")
    assert (code, err) == (DONE, "")
    found = rows(out)
    assert [Path(row["image"]).name for row in found] == ["china.jpg", "flower.JPEG", "hopper.jpg"]
    for row in found:
        given = {each["label"]: each["probability"] for each in row["predictions"]}
        expected = their_probabilities(classifier, Path(row["image"]))
        assert given.keys() == expected.keys() == set(LABELS.values())
        assert all(math.isclose(given[label], expected[label], abs_tol=1e-5) for label in given)
        assert list(given.values()) == sorted(given.values(), reverse=True)
    assert len({row["predictions"][0]["probability"] for row in found}) == 3


def test_the_formats_agree(classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = predict(capsys, classifier, photos, "--top-k", "2", "--format", "jsonl")
    found = rows(lines)
    code, text, _ = predict(capsys, classifier, photos, "--top-k", "2", "--format", "csv")
    table = list(csv.DictReader(io.StringIO(text)))
    assert code == DONE
    flat = [(row["image"], i + 1, each) for row in found for i, each in enumerate(row["predictions"])]
    assert [(row["image"], int(row["rank"]), row["label"]) for row in table] == [
        (image, rank, each["label"]) for image, rank, each in flat
    ]
    assert [float(row["probability"]) for row in table] == [each["probability"] for _, _, each in flat]
    _, text, _ = predict(capsys, classifier, photos, "--top-k", "2")
    printed = text.splitlines()
    assert len(printed) == 6
    for line, (image, rank, each) in zip(printed, flat, strict=True):
        assert line.startswith(image if rank == 1 else " ")
        assert line.endswith(f"{100 * each['probability']:.2f} %  {each['label']}")
    out = tmp_path / "result.jsonl"
    code, text, _ = predict(capsys, classifier, photos, "--top-k", "2", "--format", "jsonl", "--out", out)
    assert (code, text) == (DONE, "")
    assert out.read_text(encoding="utf-8") == lines


def test_a_run_is_a_model(classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(classifier, tmp_path / "run" / "model")
    assert predict(capsys, tmp_path / "run", photos) == predict(capsys, classifier, photos)


def test_bad_files_are_named_and_skipped(
    classifier: Path, photos: Path, bad_files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = predict(capsys, classifier, photos, photos / "gone.jpg", "--format", "jsonl")
    assert code == FAILED
    assert [Path(row["image"]).name for row in rows(out)] == ["china.jpg", "flower.JPEG", "hopper.jpg"]
    said = err.splitlines()
    for line, (path, what) in zip(said, (bad_files | {str(photos / "gone.jpg"): "No such file"}).items(), strict=False):
        assert line.startswith(f"{path}: skipped: ")
        assert what in line
    assert said[len(bad_files) + 1 :] == ["5 of 8 images were skipped"]
    code, out, err = predict(capsys, classifier, *bad_files)
    assert (code, out) == (BAD_INPUT, "")
    assert err.splitlines()[-1] == "vitscale: error: no image could be read"


@pytest.mark.parametrize(("to", "name"), [("timm", "folder"), ("mae", "file.pth")])
def test_models_of_others_open_as_they_are(
    to: str, name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same labels as by our folder, and their modules."""
    own = save(tmp_path / "own", layer_norm_eps=1e-6)
    convert(own, tmp_path / name, to)
    expected = rows(predict(capsys, own, photos, "--format", "jsonl")[1])
    found = rows(predict(capsys, tmp_path / name, photos, "--format", "jsonl")[1])
    for row, other in zip(found, expected, strict=True):
        labels, others = ({each["label"]: each["probability"] for each in r["predictions"]} for r in (row, other))
        assert labels == pytest.approx(others, abs=1e-5)
    assert main(["inspect", str(tmp_path / name), "--depth", "1"]) == DONE
    assert "ViTForImageClassification" in capsys.readouterr().out


def test_the_format_is_the_one_that_the_file_is_named_for(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, first in (("a.csv", "image,"), ("a.jsonl", '{"image"'), ("a.txt", "")):
        assert predict(capsys, classifier, photos / "china.jpg", "--out", tmp_path / name)[0] == DONE
        assert (tmp_path / name).read_text().startswith(first)
    assert not (tmp_path / "a.txt").read_text().startswith(("image,", "{"))


def test_no_file_is_left_where_nothing_could_be_read(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    code, _, _ = predict(capsys, classifier, tmp_path / "text.jpg", "--out", tmp_path / "new.csv", "--format", "csv")
    assert code == BAD_INPUT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jpg"]


def test_shards_and_stdin(classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (photos / "china.jpg", photos / "flower.JPEG", photos / "below/deeper/hopper.jpg"):
        (flat / path.name).write_bytes(path.read_bytes())
    pack(flat, tmp_path / "shards", shard_samples=2, workers=1, report=lambda text: None)
    _, out, _ = predict(capsys, classifier, flat, "--format", "jsonl")
    by_file = {Path(row["image"]).stem: row["predictions"] for row in rows(out)}
    code, out, _ = predict(capsys, classifier, tmp_path / "shards", "--format", "jsonl", "--batch", "3")
    assert code == DONE
    by_shard = {row["image"].rpartition(":")[2]: row["predictions"] for row in rows(out)}
    assert by_shard == by_file
    command = [sys.executable, "-m", "vitscale.cli", "predict", str(classifier), "-", "--format", "jsonl"]
    listed = "\n".join(map(str, flat.iterdir())).encode()
    for data, expected in ((listed, by_file), ((flat / "hopper.jpg").read_bytes(), {"-": by_file["hopper"]})):
        done = subprocess.run(command, input=data, capture_output=True, check=True)
        got = {Path(row["image"]).stem: row["predictions"] for row in rows(done.stdout.decode())}
        assert got.keys() == expected.keys()
        for name, labels in got.items():
            assert [each["label"] for each in labels] == [each["label"] for each in expected[name]]


def test_many_labels_at_once_and_values(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sigmoids of a multi-label model; the numbers themselves of a regression."""
    many = save(tmp_path / "many")
    content = json.loads((many / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (many / "config.json").write_text(json.dumps(content))
    _, out, _ = predict(capsys, many, photos / "china.jpg", "--format", "jsonl")
    (row,) = rows(out)
    logits = _logits(many, photos / "china.jpg")
    assert [each["probability"] for each in row["predictions"]] == pytest.approx(
        sorted((1 / (1 + np.exp(-logits))).tolist(), reverse=True), abs=1e-5
    )
    value = save(tmp_path / "value", id2label=None, num_labels=1)
    code, out, _ = predict(capsys, value, photos / "china.jpg", "--format", "csv")
    header, line = csv.reader(io.StringIO(out))
    assert code == DONE
    assert header == ["image", "rank", "label", "value"]
    assert line[2] == "LABEL_0"
    assert float(line[3]) == pytest.approx(_logits(value, photos / "china.jpg")[0], abs=1e-5)


def _logits(folder: Path, image: Path) -> np.ndarray:
    from vitscale.interop.image_processing import ViTImageProcessor

    batch = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        return load_model(folder)(**batch).logits[0].numpy()


def test_a_joint_model_predicts_too(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "joint", ViTForMultitaskPreTraining, encoder_stride=8)
    code, out, _ = predict(capsys, folder, photos, "--top-k", "1", "--format", "jsonl")
    assert code == DONE
    assert all(row["predictions"][0]["label"].startswith("LABEL_") for row in rows(out))


@pytest.mark.parametrize(
    ("model_class", "keys"),
    [
        (ViTModel, {}),
        (ViTMAEForPreTraining, {}),
        (ViTForMaskedImageModeling, {"encoder_stride": 8}),
        (ViTForImageClassification, {"id2label": None, "num_labels": 0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_without_a_head_is_one_line(
    model_class: Any, keys: dict[str, Any], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "model", model_class, **keys)
    code, out, err = predict(capsys, folder, photos)
    assert (code, out) == (BAD_INPUT, "")
    assert len(err.splitlines()) == 1
    assert "no classifier" in err
    assert "vitscale features" in err


def test_what_cannot_be_done_is_one_line(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ((classifier, photos, "--device", "cuda:9"), "--device cuda:9"),
        ((classifier, photos, "--device", "abacus"), "--device abacus"),
        ((classifier, photos, "--device", "meta"), "--device meta: cannot be used"),
        ((classifier, photos, "--device", "hpu"), "--device hpu: cannot be used"),
        ((classifier, photos, "--out", tmp_path / "no" / "such" / "file"), "--out"),
        ((tmp_path / "nowhere", photos), "nowhere"),
    ):
        code, out, err = predict(capsys, *arguments)
        assert (code, out) == (BAD_INPUT, "")
        assert len(err.splitlines()) == 1
        assert said in err
    for arguments in ((classifier, photos, "--top-k", "0"), (classifier, photos, "--format", "xml"), (classifier,)):
        with pytest.raises(SystemExit) as error:
            main(["predict", *map(str, arguments)])
        assert error.value.code == 2


def test_a_processor_of_another_model(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model")
    path = folder / "preprocessor_config.json"
    right = json.loads(path.read_text())
    for change, said in (
        ({"size": {"height": 40, "width": 32}}, ("40x32", "image_size=32", "resize", "interpolate_pos_encoding")),
        ({"size": {"shortest_edge": 32}}, ("their own size", "crop_size")),
        ({"image_mean": [0.5], "image_std": [0.5]}, ("1 channels", "num_channels=3")),
    ):
        path.write_text(json.dumps(right | change))
        code, _, err = predict(capsys, folder, photos)
        assert code == BAD_INPUT
        assert all(each in err for each in said)
        assert len(err.splitlines()) == 1


def test_damaged_weights_are_told(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    path = save(tmp_path / "model") / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.bias"][2] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    code, out, err = predict(capsys, tmp_path / "model", photos)
    assert (code, out) == (BAD_INPUT, "")
    assert "NaN" in err
    assert "china.jpg" in err


def test_help_says_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("predict", "features"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "0 every image was read, 1 some were skipped, 2 none could be read" in said
        assert "stdin" in said


@pytest.mark.parametrize(
    ("encoding", "form"), [("ascii", "table"), ("latin-1", "csv"), ("ascii", "jsonl"), ("cp1252", "jsonl")]
)
def test_any_label_and_any_name_on_any_terminal(tmp_path: Path, encoding: str, form: str) -> None:
    """A label beyond the encoding, a name that is no text, and one that would move the cursor."""
    names = {0: "猫", 1: "🐈", 2: "ключ", 3: "crème"}
    model = save(tmp_path / "model", id2label=names)
    images = [os.fsencode(tmp_path) + name for name in (b"/caf\xe9.png", "/猫🐈.png".encode(), b"/\x1b[2Jclear\n.png")]
    for image in images:
        Image.new("RGB", (9, 9)).save(os.fsdecode(image))
    command = [sys.executable, "-m", "vitscale.cli", "predict", str(model), *map(os.fsdecode, images), "--format", form]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == DONE, done.stderr.decode(errors="replace")
    text = done.stdout.decode(encoding)
    assert "caf\\xe9.png" in text or "caf\\\\xe9.png" in text or "caf\\udce9" in text
    if form == "jsonl":
        assert {each["label"] for row in rows(text) for each in row["predictions"]} == set(names.values())
    if form == "table":
        assert "\x1b" not in text
        assert text.count("\n") == 12


def test_a_scan_that_is_larger_than_usual(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (400, 300)).save(tmp_path / "scan.png")
    code, _, error = predict(capsys, classifier, tmp_path / "scan.png", "--max-pixels", "100000")
    assert code == BAD_INPUT
    assert "more than 100000 pixels" in error
    assert predict(capsys, classifier, tmp_path / "scan.png", "--max-pixels", "120000")[0] == DONE


def test_what_pillow_warns_of_is_not_printed(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A TIFF whose description is longer than the file: it is an image all the same."""
    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "TIFF", description="sky")
    tag = struct.pack("<HHI", 270, 2, 4)
    (tmp_path / "a.tiff").write_bytes(stream.getvalue().replace(tag, struct.pack("<HHI", 270, 2, 10**6)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert predict(capsys, classifier, tmp_path / "a.tiff")[0] == DONE
    assert not [warning for warning in caught if "PIL" in warning.filename]
