"""`vitscale convert`: from any of the kinds to any; what it writes is held against the real libraries here."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion import witnesses
from tests.conversion.comparing import shaken
from tests.models.shapes import DECODER, TINY
from vitscale.cli import main
from vitscale.conversion import convert as convert_module
from vitscale.conversion import timm as timm_module
from vitscale.conversion.convert import Report, compare, convert
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.loading import open_model
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


def agrees(target: str, path: Path, model: ViTPreTrainedModel) -> None:
    """The real library opens what was written, and gives what our model gives."""
    witness = {
        "hf": lambda: witnesses.by_transformers(path, model),
        "timm": lambda: witnesses.by_timm(path),
        "mae": lambda: witnesses.by_mae(path, model),
    }[target]()
    inputs = witnesses.inputs_for(model)
    expected, actual = witnesses.ours(model, inputs), witness.run(inputs)
    shared = expected.keys() & actual.keys()
    assert shared
    for name in shared:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-5)


def good(report: Report) -> None:
    assert report.comparison is not None
    assert report.comparison.good
    assert report.comparison.difference < 1e-5


@pytest.mark.parametrize("target", ["hf", "timm", "mae", "vitscale"])
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_ours_to_each_and_back(tmp_path: Path, model_class: type[ViTPreTrainedModel], target: str) -> None:
    source, there, back = our_folder(tmp_path / "ours", model_class), tmp_path / "there", tmp_path / "back"
    report = convert(source, there, target)
    good(report)
    assert report.tensors == len(load_file(source / "model.safetensors"))
    if target != "vitscale":
        agrees(target, there, load_model(source))
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
    good(convert(tmp_path / "timm", tmp_path / "hf", "hf"))
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
    good(convert(source, tmp_path / "timm", "timm"))
    agrees("timm", tmp_path / "timm", load_model(source))
    assert load_model(convert_to(tmp_path / "timm", tmp_path / "again")).config == load_model(source).config


def convert_to(source: Path, to: Path) -> Path:
    convert(source, to, "vitscale")
    return to


def test_a_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are read otherwise than they were written: here, since the writer says another number of heads."""
    source = our_folder(tmp_path / "ours")
    honest = timm_module.arguments_for

    def lying(config: Any) -> Any:
        architecture, arguments, notes = honest(config)
        return architecture, arguments | {"num_heads": 4}, notes

    monkeypatch.setattr(timm_module, "arguments_for", lying)
    with pytest.raises(CheckpointError, match=r"timm: is not written, since outputs on random images differ"):
        convert(source, tmp_path / "timm", "timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_an_eps_that_matters_is_a_failed_check(tmp_path: Path) -> None:
    source = our_folder(tmp_path / "ours", layer_norm_eps=0.1)
    with pytest.raises(CheckpointError, match=r"layer_norm_eps=0.1 became 1e-05"):
        convert(source, tmp_path / "timm", "timm")
    report = convert(our_folder(tmp_path / "small", layer_norm_eps=1e-12), tmp_path / "good", "timm")
    (note,) = report.notes
    assert note.startswith("layer_norm_eps=1e-12 became 1e-06: timm has no argument for it; ")


@pytest.mark.parametrize("model_class", [ViTMAEForPreTraining, ViTForMaskedImageModeling], ids=lambda c: c.__name__)
def test_other_libraries_change_nothing(tmp_path: Path, model_class: type[ViTPreTrainedModel]) -> None:
    """With a timm and a transformers that do not import, what hides patches is written to each target all the same."""
    source, broken = our_folder(tmp_path / "ours", model_class), tmp_path / "broken"
    for library in ("timm", "transformers"):
        (broken / library).mkdir(parents=True)
        (broken / library / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    code = "\n".join(
        f"assert main(['convert', {str(source)!r}, {str(tmp_path / target)!r}, '--to', {target!r}]) == 0"
        for target in ("hf", "timm", "mae")
    )
    path = os.pathsep.join(map(str, (broken, Path(__file__).parents[2])))
    command = [sys.executable, "-c", f"from vitscale.cli import main\n{code}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == DONE, done.stderr
    assert done.stdout.count("TO was read again and run on random images, as was FROM: largest difference") == 3
    for target in ("hf", "timm", "mae"):
        agrees(target, tmp_path / target, load_model(source))


def test_numbers_that_are_none_fail(tmp_path: Path) -> None:
    source = our_folder(tmp_path / "ours")
    weights = load_file(source / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not written"):
        convert(source, tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


def test_the_worst_output_is_named() -> None:
    model = ViTForImageClassification(ViTForImageClassification.config_class(**TINY | {"num_labels": 5}))
    initialize(model, 0)
    other = copy.deepcopy(model.eval())
    assert compare(model, other).difference == 0
    with torch.no_grad():
        other.classifier.bias.add_(0.1)
    comparison = compare(model, other)
    assert not comparison.good
    assert comparison.output == "logits"
    assert convert_module.TOLERANCE <= 1e-4


# ---------------------------------------------------------------- the verb
def test_the_verb_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = our_folder(tmp_path / "ours", ViTMAEForPreTraining)
    assert main(["convert", str(source), str(tmp_path / "timm"), "--to", "timm"]) == DONE
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ViTMAEForPreTraining of hf: ")
    assert "not written" in said[1]
    assert "decoder.decoder_pred.bias" in said[1]
    assert sum("largest difference" in line for line in said) == 1
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
    assert "is for a bare file of weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("layer_norm_eps=inf", "must be a number"),
        ("image_size=16,a", "must be a whole number or a list of 2 whole numbers"),
        ("image_size=16,16,16", "must be a whole number or a list of 2 whole numbers"),
        ("norm_pix_loss=1", "must be true or false"),
        ("num_attention_heads=4.0", "must be a whole number"),
        ("num_atention_heads=4", "must be KEY=VALUE, of num_attention_heads, .*did you mean num_attention_heads"),
        ("num_attention_heads", "unrecognized arguments: num_attention_heads$"),
        ("--layer_norm_eps=1", "unrecognized arguments: --layer_norm_eps=1; write layer_norm_eps=VALUE"),
    ],
)
def test_values_are_typed_as_in_a_config(word: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["convert", "from.pth", "to", "--to", "hf", word]) == BAD_INPUT
    assert re.search(says, capsys.readouterr().err.strip())


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
    torch.save({"model": {"a": exec}}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "to"), "--to", "hf"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "which could run anything" in error
    assert error.count("\n") == 1


def test_names_from_files_move_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of a checkpoint and of config.json, and the name of a file: each stays within its line."""
    source = our_folder(tmp_path / "ours")
    content = json.loads((source / "config.json").read_text()) | {"k\r\x1b[31m": 1}
    (source / "config.json").write_text(json.dumps(content))
    state = load_file(source / "model.safetensors")
    torch.save({"a\n\x1b]0;b\x07": state, "c\x9b2J": state}, tmp_path / "d\ne.pth")
    assert main(["convert", str(source), str(tmp_path / "f\tg"), "--to", "hf"]) == DONE
    assert main(["inspect", str(source), "--depth", "0"]) == DONE
    assert main(["convert", str(tmp_path / "d\ne.pth"), str(tmp_path / "no"), "--to", "hf"]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert "k\\r\\x1b[31m" in out
    assert "a\\n\\x1b]0;b\\x07 (" in err
    assert len(err.splitlines()) == 2
    assert all(line.isprintable() for line in (out + err).split("\n"))


def test_a_folder_without_a_processor_says_so(tmp_path: Path) -> None:
    source = our_folder(tmp_path / "ours")
    (source / "preprocessor_config.json").unlink()
    opened = open_model(source)
    assert "preprocessor_config.json" in opened.notes[0]
    assert opened.processor.image_mean == (0.5, 0.5, 0.5)
