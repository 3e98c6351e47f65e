"""What `vitscale convert` refuses: one line, code 2, and nothing is there afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.test_convert import agrees, our_folder
from tests.conversion.timm_models import PLAIN, save_theirs, tiny_timm
from vitscale.cli import main
from vitscale.conversion import timm as timm_module
from vitscale.conversion.convert import convert
from vitscale.interop.pretrained import load_model
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.positions import is_table, sincos_table
from vitscale.models.vit import ViTModel
from vitscale.run_folder import BAD_INPUT, DONE

pytest.importorskip("transformers")


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the verb, which must fail; what it says."""

    def run(source: Path, target: str, *given: str) -> str:
        before = sorted(tmp_path.iterdir())
        capfd.readouterr()
        assert main(["convert", str(source), str(tmp_path / "to"), *given, "--to", target]) == BAD_INPUT
        said = capfd.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert sorted(tmp_path.iterdir()) == before
        return said.err.strip()

    return run


def edit(folder: Path, key: str, **values: Any) -> Path:
    content = json.loads((folder / "config.json").read_text())
    content[key] |= values
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_a_folder_that_contradicts_itself(tmp_path: Path, refused: Any) -> None:
    folder = save_theirs(tiny_timm(PLAIN), tmp_path / "timm")
    edit(folder, "model_args", depth=5, embed_dim=64, qk_norm=True, reg_tokens=3)
    said = refused(folder, "vitscale")
    assert "embed_dim=64 (the tensors have 32), depth=5 (the tensors have 2), qk_norm=True" in said
    assert str(folder / "config.json") in said


def test_a_written_folder_that_cannot_be_read_again_is_named_as_asked_for(
    tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = timm_module.arguments_for

    def lying(config: Any) -> Any:
        architecture, arguments, notes = honest(config)
        return architecture, arguments | {"depth": 1, "embed_dim": 32}, notes

    monkeypatch.setattr(timm_module, "arguments_for", lying)
    text = refused(our_folder(tmp_path / "ours"), "timm")
    assert f"{tmp_path / 'to' / 'config.json'}: " in text
    assert "depth=1 (the tensors have 3)" in text
    assert ".tmp" not in text


@pytest.mark.parametrize("target", ["timm", "mae"])
def test_an_encoder_without_its_last_norm(tmp_path: Path, refused: Any, target: str) -> None:
    source = our_folder(tmp_path / "ours", ViTModel, fc_norm=True, pooling="mean")
    assert "fc_norm=True: a ViTModel alone is without its last norm" in refused(source, target)
    convert(source, tmp_path / "again", "vitscale")


@pytest.mark.parametrize("target", ["timm", "mae"])
def test_an_activation_that_the_target_has_not(tmp_path: Path, refused: Any, target: str) -> None:
    assert "hidden_act='mish': " in refused(our_folder(tmp_path / "ours", hidden_act="mish"), target)


@pytest.mark.parametrize("word", [
    "image_size={", "image_size=2026-99-99", "image_size", "norm_pix_loss='", "image_size=", "image_size=16,",
    "image_size=true", "image_size=1.5,16",
])  # fmt: skip
def test_a_word_that_is_no_value(tmp_path: Path, refused: Any, word: str) -> None:
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "a.pth")
    assert f"{word}: must be " in refused(tmp_path / "a.pth", "hf", word)


# ---------------------------------------------------------------- what looks wrong and is not
def test_a_whole_number_for_transformers(tmp_path: Path) -> None:
    """Its config insists on a point; ours does not."""
    source = our_folder(tmp_path / "ours")
    content = json.loads((source / "config.json").read_text()) | {"layer_norm_eps": 1, "hidden_dropout_prob": 0}
    (source / "config.json").write_text(json.dumps(content))
    report = convert(source, tmp_path / "hf", "hf")
    assert report.comparison is not None
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["layer_norm_eps"] == 1.0
    import transformers

    transformers.AutoModel.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["hf", "mae"])
def test_a_masked_autoencoder_in_half_precision(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Its fixed positions are rounded in the file and whole in ours; everything else must agree."""
    source = our_folder(tmp_path / "ours", ViTMAEForPreTraining)
    if kind == "hf":
        weights = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    else:
        convert(source, tmp_path / "a.pth", "mae")
        source, content = tmp_path / "a.pth", torch.load(tmp_path / "a.pth", weights_only=True)
        content["model"] = {name: value.to(dtype) for name, value in content["model"].items()}
        torch.save(content, source)
    for target in ("hf", "mae"):
        report = convert(source, tmp_path / target, target)
        assert report.comparison is not None
        assert report.comparison.difference < 1e-5
    assert main(["convert", str(tmp_path / "mae"), str(tmp_path / "again"), "--to", "vitscale"]) == DONE


def test_a_table_and_its_roundings() -> None:
    table = sincos_table(16, (4, 4))
    assert all(is_table(each, table) for each in (table, table.half(), table.bfloat16(), table.half().float()))
    assert not is_table(table * 1.003, table)  # within bfloat16's precision of it, and no rounding
    assert not is_table(table.bfloat16() * 1.1, table)
    assert not is_table(sincos_table(16, (2, 8)), table)
    assert not is_table(table[:, 1:], table)


def test_a_width_whose_ratio_is_no_float(tmp_path: Path) -> None:
    """int(11 * (15 / 11)) is 14."""
    source = our_folder(tmp_path / "ours", hidden_size=11, num_attention_heads=1, intermediate_size=15)
    convert(source, tmp_path / "a", "mae")
    agrees("mae", tmp_path / "a", load_model(source))


def test_a_file_that_is_not_there(tmp_path: Path, refused: Any) -> None:
    assert "nofile.pth: no such file; name a file of weights, a model's folder or " in refused(
        tmp_path / "nofile.pth", "hf"
    )
