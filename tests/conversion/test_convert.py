"""`vitscale convert`: from any of the kinds to any, checked by their own libraries before it says done."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.comparing import shaken
from tests.models.shapes import DECODER, TINY
from vitscale.cli import main
from vitscale.conversion import convert as convert_module
from vitscale.conversion import timm as timm_module
from vitscale.conversion.convert import compare, convert, open_source
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import load_model, save_model
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.run_folder import BAD_INPUT, DONE

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

CLASSES = [
    ViTModel, ViTForImageClassification, ViTForMaskedImageModeling, ViTMAEForPreTraining, ViTForMultitaskPreTraining,
]  # fmt: skip
# MAE's code has one mlp_ratio.
SAME_RATIO = DECODER | {"decoder_intermediate_size": int(DECODER["decoder_hidden_size"] * 1.5)}


def our_folder(folder: Path, model_class: type[ViTPreTrainedModel] = ViTForImageClassification, **keys: Any) -> Path:
    more = SAME_RATIO if model_class is ViTMAEForPreTraining else {"encoder_stride": 4, "num_labels": 5}
    model = model_class(model_class.config_class(**TINY | {"layer_norm_eps": 1e-6} | more | keys))
    initialize(model, 0)
    shaken(model)
    save_model(folder, model_class.__name__, model.config, model.state_dict(), (0.4,), (0.3,))
    return folder


def opens_with(target: str, path: Path) -> None:
    if target == "timm":
        timm.create_model(f"local-dir:{path}", pretrained=True)
    elif target == "hf":
        transformers.AutoModel.from_pretrained(path)
    else:
        assert torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("target", ["hf", "timm", "mae", "vitscale"])
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_ours_to_each_and_back(tmp_path: Path, model_class: type[ViTPreTrainedModel], target: str) -> None:
    source, there, back = our_folder(tmp_path / "ours", model_class), tmp_path / "there", tmp_path / "back"
    report = convert(source, there, target)
    assert [check.what.split(" in ")[0] for check in report.checks] == ["FROM", "TO"]
    assert all(check.good and check.difference < 1e-5 for check in report.checks)
    assert report.unchecked == []
    assert report.tensors == len(load_file(source / "model.safetensors"))
    if target != "vitscale":
        opens_with(target, there)
        by = {"hf": "transformers", "timm": "timm", "mae": "MAE code"}[target]
        assert by in report.checks[1].what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "there"]  # no draft is left

    convert(there, back, "vitscale")
    ours, again = load_model(source), load_model(back)
    whole = target in ("hf", "vitscale") or (target == "mae" and model_class is ViTMAEForPreTraining)
    if whole:
        assert type(again) is model_class
    left = {name.removeprefix("vit.") for name in report.left_out}
    kept = {name: value for name, value in ours.state_dict().items() if name.removeprefix("vit.") not in left}
    found = {name.removeprefix("vit."): value for name, value in again.state_dict().items()}
    positions = again.config.position_embeddings != ours.config.position_embeddings  # a fixed table is learned in timm
    assert found.keys() - {name.removeprefix("vit.") for name in kept} <= {"embeddings.position_embeddings"}
    assert positions or len(found) == len(kept)
    assert all(torch.equal(found[name.removeprefix("vit.")], value) for name, value in kept.items())
    assert ViTImageProcessor.from_pretrained(back) == ViTImageProcessor.from_pretrained(source)


def test_from_timm_to_transformers(tmp_path: Path) -> None:
    """The two libraries that are not ours agree with each other, by way of us."""
    theirs = timm.create_model("vit_small_patch16_224", img_size=(32, 48), embed_dim=32, depth=2, num_heads=4).eval()
    timm.models.save_for_hf(theirs, tmp_path / "timm", safe_serialization=True)
    report = convert(tmp_path / "timm", tmp_path / "hf", "hf")
    assert [check.what.split()[2] for check in report.checks] == ["timm", "transformers"]
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.allclose(found(x).logits, theirs(x), atol=1e-5)


def test_a_run_folder_is_its_model(tmp_path: Path) -> None:
    our_folder(tmp_path / "run" / "model")
    convert(tmp_path / "run", tmp_path / "timm", "timm")
    opens_with("timm", tmp_path / "timm")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_register_tokens": 2}, "num_register_tokens=2"),
        ({"pooling": "mean", "fc_norm": True}, "pooling='mean', fc_norm=True"),
        ({"rope_theta": 100.0, "position_embeddings": "none"}, "rope_theta=100.0, position_embeddings='none'"),
    ],
)
def test_what_transformers_has_not_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    source = our_folder(tmp_path / "ours", **keys)
    with pytest.raises(ConfigError, match=f"^{named}: transformers' ViT has none of it"):
        convert(source, tmp_path / "hf", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
    report = convert(source, tmp_path / "timm", "timm")
    assert "timm" in report.checks[1].what
    assert load_model(convert_to(tmp_path / "timm", tmp_path / "again")).config == load_model(source).config


def convert_to(source: Path, to: Path) -> Path:
    convert(source, to, "vitscale")
    return to


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that another library reads otherwise: here, since the writer says another number of heads."""
    source = our_folder(tmp_path / "ours")
    honest = timm_module.arguments_for

    def lying(config: Any) -> Any:
        architecture, arguments, notes = honest(config)
        return architecture, arguments | {"num_heads": 4}, notes

    monkeypatch.setattr(timm_module, "arguments_for", lying)
    with pytest.raises(CheckpointError, match=r"timm: is not written, since outputs .* TO in timm"):
        convert(source, tmp_path / "timm", "timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_an_eps_that_matters_is_a_failed_check(tmp_path: Path) -> None:
    source = our_folder(tmp_path / "ours", layer_norm_eps=0.1)
    with pytest.raises(CheckpointError, match=r"layer_norm_eps=0.1 became 1e-05"):
        convert(source, tmp_path / "timm", "timm")
    report = convert(our_folder(tmp_path / "small", layer_norm_eps=1e-12), tmp_path / "good", "timm")
    (note,) = report.notes
    assert note.startswith("layer_norm_eps=1e-12 became 1e-06: timm has no argument for it; ")


def test_without_timm_what_was_written_is_read_again_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, usual = our_folder(tmp_path / "ours"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else usual(name))
    for target in ("timm", "mae"):
        report = convert(source, tmp_path / target, target)
        assert [check.what.split(" in ")[0] for check in report.checks] == ["FROM", "TO"]
        assert report.checks[1].what == "TO in this library, read again"
        assert report.lines()[-1] == (
            "not checked: TO by its own library: timm is not installed; `pip install timm` lets it check"
        )


def test_a_library_that_does_not_import_is_said(tmp_path: Path) -> None:
    """As a torchvision that does not fit torch makes of transformers and timm; no finder helps here."""
    source = our_folder(tmp_path / "ours")
    broken = tmp_path / "broken"
    (broken / "timm").mkdir(parents=True)
    (broken / "timm" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    (broken / "transformers").mkdir()
    (broken / "transformers" / "__init__.py").write_text("raise ImportError('no torchvision')\n")
    command = [sys.executable, "-m", "vitscale.cli", "convert", source, tmp_path / "timm", "--to", "timm"]
    path = os.pathsep.join(map(str, (broken, Path(__file__).parents[2])))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == DONE, done.stderr
    assert "timm is installed and does not import (operator nms does not exist)" in done.stdout
    assert "FROM: transformers is installed and does not import (no torchvision)" in done.stdout
    assert "TO in this library, read again" in done.stdout
    opens_with("timm", tmp_path / "timm")


def test_numbers_that_are_none_fail(tmp_path: Path) -> None:
    source = our_folder(tmp_path / "ours")
    weights = load_file(source / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not written"):
        convert(source, tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


def test_the_worst_output_is_told() -> None:
    one, two = torch.ones(2, 3), torch.ones(2, 3) + 1e-6
    check = compare("TO", {"logits": two, "last_hidden_state": one}, {"logits": one, "last_hidden_state": one})
    assert check.good
    assert check.output == "logits"
    bad = compare("TO", {"logits": two, "last_hidden_state": one + 0.1}, {"logits": one, "last_hidden_state": one})
    assert not bad.good
    assert bad.output == "last_hidden_state"
    assert not compare("TO", {"logits": one}, {"logits": torch.ones(2, 4)}).good
    assert convert_module.TOLERANCE <= 1e-4


# ---------------------------------------------------------------- the verb
def test_the_verb_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = our_folder(tmp_path / "ours", ViTMAEForPreTraining)
    assert main(["convert", str(source), str(tmp_path / "timm"), "--to", "timm"]) == DONE
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ViTMAEForPreTraining of hf: ")
    assert "not written" in said[1]
    assert "decoder.decoder_pred.bias" in said[1]
    assert sum("largest difference" in line for line in said) == 2
    assert said[-1] == f"done: {tmp_path / 'timm'}"

    assert main(["convert", str(source), str(tmp_path / "timm"), "--to", "timm"]) == BAD_INPUT
    assert "is there already; name a new folder" in capsys.readouterr().err


def test_the_verb_takes_what_a_pth_does_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, path = our_folder(tmp_path / "ours", ViTMAEForPreTraining), tmp_path / "mae.pth"
    assert main(["convert", str(source), str(path), "--to", "mae"]) == DONE
    torch.save({"model": torch.load(path, weights_only=True)["model"]}, path)  # as the MAE code would
    capsys.readouterr()
    assert main(["convert", str(path), str(tmp_path / "hf"), "--to", "hf"]) == BAD_INPUT
    assert "give num_attention_heads=N" in capsys.readouterr().err
    given = ["num_attention_heads=2", "decoder_num_attention_heads=2", "norm_pix_loss=true"]
    assert main(["convert", str(path), str(tmp_path / "hf"), *given, "--to", "hf"]) == DONE
    again = load_model(tmp_path / "hf")
    assert isinstance(again, ViTMAEForPreTraining)
    assert again.config.norm_pix_loss is True
    assert main(["convert", str(path), str(tmp_path / "no"), "--to", "hf", "image_size=16,16", *given]) == DONE
    assert main(["convert", str(source), str(tmp_path / "other"), "--to", "hf", "image_size=16"]) == BAD_INPUT
    assert "is for a MAE .pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "config.json",
            {"architecture": "resnet50", "pretrained_cfg": {}},
            "from/config.json: architecture='resnet50': is none of",
        ),
        ("config.json", {"model_type": "bert"}, "model_type='bert'"),
        ("other.json", {}, "holds no config.json"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: dict[str, Any], said: str
) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / name).write_text(json.dumps(content))
    assert main(["convert", str(tmp_path / "from"), str(tmp_path / "to"), "--to", "hf"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "to").exists()


def test_a_pickle_that_would_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"a": print}}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "to"), "--to", "hf"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "holds more than tensors" in error
    assert error.count("\n") == 1


def test_a_folder_without_a_processor_says_so(tmp_path: Path) -> None:
    source = our_folder(tmp_path / "ours")
    (source / "preprocessor_config.json").unlink()
    opened, _ = open_source(source, {})
    assert "preprocessor_config.json" in opened.notes[0]
    assert opened.processor.image_mean == (0.5, 0.5, 0.5)
