"""`vitscale export MODEL --format ...` as a user runs it: what is printed, kept, and refused."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers

from tests.data.makers import write_shards
from tests.export.small import noise, saved, small, write_pictures
from vitscale.cli import main
from vitscale.export import onnx as exporter
from vitscale.export.agreement import Runner
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import load_model
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTModel
from vitscale.run_folder import BAD_INPUT, DONE

LABELS = {number: f"class{number}" for number in range(5)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, pictures and a shard."""
    home = tmp_path_factory.mktemp("home")
    saved(small(id2label=LABELS), home / "model")
    saved(small(ViTModel), home / "encoder")
    saved(small(ViTMAEForPreTraining, decoder_hidden_size=16, decoder_num_attention_heads=2), home / "mae")
    write_pictures(home / "pictures", 12)
    write_shards(home, [5])
    (home / "bare").mkdir()
    write_shards(home / "bare", [2], labels=False)
    return home


@pytest.fixture
def work(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder beside the models."""
    monkeypatch.chdir(tmp_path)
    for each in home.iterdir():
        (tmp_path / each.name).symlink_to(each)
    return tmp_path


def made(work: Path, home: Path) -> list[str]:
    """What is in the working folder that was not there before."""
    return sorted(each.name for each in work.iterdir() if not (home / each.name).exists())


def rows(text: str) -> dict[str, list[str]]:
    """The table's lines by their first word or words."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if "ms/image" in line)
    end = next(number for number, line in enumerate(lines) if line.startswith("agreement with fp32"))
    found = [line.split("  ") for line in lines[start + 1 : end]]
    return {words[0]: [word.strip() for word in words[1:] if word.strip()] for words in found}


def test_onnx(work: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "model", "--format", "onnx", "--images", "pictures", "--labelled"]) == DONE
    said = capsys.readouterr().out
    assert made(work, home) == ["model.onnx"]
    assert said.splitlines()[-1] == "model.onnx"
    table = rows(said)
    assert list(table) == ["fp32", "onnx"]
    assert len(table["fp32"]) == 3, "size, latency, accuracy"
    assert table["onnx"][2] == "100.00 %"
    assert float(table["onnx"][3]) < 1e-4
    assert table["onnx"][4] == table["fp32"][2]
    assert "agreement with fp32 on 12 images" in said
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["config.json"])["id2label"] == {str(number): name for number, name in LABELS.items()}
    assert json.loads(told["preprocessor_config.json"])["image_mean"] == [0.5, 0.5, 0.5]
    images = noise(3, small())
    expected = load_model("model")(images).logits.detach()
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0]), expected)


def test_static_and_pruned(work: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "export model --format onnx --quantize static --calibrate pictures s000.tar --prune mlp 0.5"
    assert main(shlex.split(words)) == DONE
    said = capsys.readouterr().out
    assert made(work, home) == ["model-pruned-static.onnx"]
    table = rows(said)
    assert list(table) == ["fp32", "pruned", "onnx", "onnx, int8 static"]
    assert "agreement with fp32 on 17 images" in said
    sizes = [float(row[0]) for row in table.values()]
    assert sizes[1] < sizes[0]
    assert sizes[3] < sizes[2]
    assert "by the weights' magnitude" in said
    session = onnxruntime.InferenceSession("model-pruned-static.onnx", providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["config.json"])
    assert (told["intermediate_size"], told["id2label"]["4"]) == (32, "class4")


def test_dynamic_quantization_of_an_encoder(work: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("export encoder --format onnx --quantize dynamic --dynamic-size --out a/b.onnx")) == DONE
    said = capsys.readouterr().out
    assert made(work, home) == ["a"]
    assert [each.name for each in (work / "a").iterdir()] == ["b.onnx"]
    assert "top-1" not in said, "features have no classes"
    assert "on 12 random images" in said
    session = onnxruntime.InferenceSession("a/b.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixel_values": noise(2, small(), (40, 24)).numpy()})
    assert [output.shape for output in found] == [(2, 16, 32), (2, 32)]


def test_torch_export(work: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "model", "--format", "torch-export"]) == DONE
    assert made(work, home) == ["model.pt2"]
    assert list(rows(capsys.readouterr().out)) == ["fp32", "torch-export"]
    images = noise(4, small())
    expected = load_model("model")(images).logits
    torch.testing.assert_close(torch.export.load("model.pt2").module()(images)[0], expected)


def test_int8_weights(work: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao", reason="no torchao here")
    assert main(shlex.split("export model --format torch-export --quantize int8-weights")) == DONE
    assert made(work, home) == ["model-int8-weights.pt2"]
    assert list(rows(capsys.readouterr().out)) == ["fp32", "int8 weights", "torch-export"]


def test_pruned_folder(work: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "export model --prune heads 0.5 --prune mlp 0.25 --images pictures --labelled --out smaller"
    assert main(shlex.split(words)) == DONE
    said = capsys.readouterr().out
    assert made(work, home) == ["smaller"]
    table = rows(said)
    assert list(table) == ["fp32", "pruned", "folder"]
    assert all(row[-1].endswith("%") for row in table.values()), "the accuracy before and after"
    assert table["pruned"][2:] == table["folder"][2:]
    assert said.count("by the loss of 12 labelled images") == 2
    assert "the folder opens in vitscale, and in transformers 5.9 or later" in said
    config = load_model("smaller").config
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (2, 8, 48)
    assert config.id2label == LABELS
    processors = [(folder / "preprocessor_config.json").read_bytes() for folder in (work / "smaller", home / "model")]
    assert processors[0] == processors[1]
    theirs = transformers.AutoModelForImageClassification.from_pretrained("smaller").eval()
    images = noise(2, small())
    torch.testing.assert_close(theirs(images).logits, load_model("smaller")(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (4, {"do_normalize": False}),
        (4, {"image_mean": 0.4, "image_std": 0.2}),
        (1, {"image_mean": [0.4], "image_std": 2}),
    ],
)
def test_a_pruned_folder_keeps_its_processor(
    channels: int, options: dict[str, Any], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = ViTImageProcessor(size=32, **options)
    small(num_channels=channels).save_pretrained("own")
    processor.save_pretrained("own")
    assert main(shlex.split("export own --prune mlp 0.5 --out smaller")) == DONE
    assert "the folder opens in vitscale and transformers\n" in capsys.readouterr().out
    assert ViTImageProcessor.from_pretrained("smaller") == processor


def test_the_heads_of_an_mae_by_the_way_out_that_is_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("export mae --prune heads 0.5 --out smaller")) == BAD_INPUT
    assert "ViTModel.from_pretrained(MODEL).save_pretrained(FOLDER)" in capsys.readouterr().err
    ViTModel.from_pretrained("mae").save_pretrained("alone")
    assert main(shlex.split("export alone --prune heads 0.5 --out smaller")) == DONE
    assert load_model("smaller").config.num_attention_heads == 2


@pytest.mark.parametrize("wrong", [lambda pixels: len(pixels) == 1, lambda pixels: pixels.shape[2] != pixels.shape[3]])
def test_given_images_do_not_take_the_place_of_other_numbers_and_sizes(
    wrong: Callable[[torch.Tensor], bool], work: Path, home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The pictures are two batches of several squares: a file that fails elsewhere is found out all the same."""
    real = exporter.open_onnx
    saved(small(num_hidden_layers=1), work / "shallow")
    before = made(work, home)

    def open_broken(path: Path) -> Runner:
        run = real(path)
        return lambda pixels: tuple(output + wrong(pixels) for output in run(pixels))

    monkeypatch.setattr(exporter, "open_onnx", open_broken)
    assert main(shlex.split("export shallow --format onnx --dynamic-size --images pictures")) == BAD_INPUT
    assert "onnx: differs from fp32 by 1" in capsys.readouterr().err
    assert made(work, home) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "model",
            "holds no checkpoint; name a run's folder or a checkpoint in it, or for a model add --format onnx, "
            "--format torch-export or --prune",
        ),
        ("nowhere", "no such folder; name a run's folder"),
        ("mae --prune heads 0.5 --out new", "--prune heads: ViTMAEForPreTraining has one head_dim"),
        ("model --format onnx --quantize static", "--quantize static: needs --calibrate"),
        ("model --format onnx --quantize int8-weights", "is for --format torch-export, not onnx"),
        ("model --format torch-export --quantize static --calibrate pictures", "is for --format onnx"),
        ("model --quantize dynamic", "--quantize dynamic: is for --format onnx, not hf"),
        ("model --dynamic-size", "--dynamic-size: is for --format onnx or torch-export"),
        ("model --prune mlp 0.5 --dynamic-size", "--dynamic-size: is for --format onnx or torch-export"),
        ("model --images pictures", "--images: is for --format"),
        ("model --prune tails 0.5", "--prune tails 0.5: must be heads or mlp"),
        ("model --prune mlp much", "--prune mlp much: must be heads or mlp, and a number between 0 and 1"),
        ("model --prune mlp 0.5 --prune mlp 0.5", "--prune mlp: is given twice"),
        ("model --prune mlp 0.5 --out model", "--out model: exists"),
        ("model --prune mlp 0.5 --calibrate pictures --out new", "--calibrate: is for --quantize static"),
        ("model --format onnx --labelled", "--labelled: says that images have labels"),
        ("model --format onnx --out model.bin", "must be the name of a file that ends in .onnx"),
        ("model --format torch-export --out model.onnx", "ends in .pt2"),
        ("encoder --format onnx --images pictures --labelled", "--labelled: encoder is a ViTModel"),
        ("nowhere/at/all --format onnx", "nowhere/at/all"),
        ("model --format onnx --images nowhere", "no image could be read"),
        ("model --format onnx --out /proc/x.onnx", "--out /proc/x.onnx: cannot be written"),
        ("model --prune heads 0.01 --out new", "--prune heads 0.01: leaves 4 of 4 attention heads"),
    ],
)
def test_refused(work: Path, home: Path, words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *shlex.split(words)]) == BAD_INPUT
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.splitlines()[-1].startswith("vitscale: error: ")
    assert made(work, home) == []


def test_a_model_without_numbers(work: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("classifier.weight")[0, 0] = float("nan")
    saved(model, work / "broken")
    before = made(work, home)
    for words in ("--format onnx --quantize dynamic", "--prune mlp 0.5 --out new"):
        assert main(["export", "broken", *shlex.split(words)]) == BAD_INPUT
        assert "NaN" in capsys.readouterr().err
        assert made(work, home) == before


@pytest.mark.parametrize("words", ["--format onnx --out old.onnx", "--format torch-export --out new.pt2"])
def test_what_fails_when_all_is_written_leaves_nothing(
    work: Path, home: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels are read last, when the file is there to be compared."""
    (work / "old.onnx").write_text("old")
    assert main(shlex.split(f"export model {words} --images bare/s000.tar --labelled")) == BAD_INPUT
    assert "its label (.cls) is missing" in capsys.readouterr().err
    assert made(work, home) == ["old.onnx"]
    assert (work / "old.onnx").read_text() == "old"


def test_an_onnxruntime_that_does_not_import_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # its import raises, though the package is there
    assert main(["export", "model", "--format", "onnx"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "--format onnx: needs onnxruntime (" in error
    assert error.count("\n") == 1
