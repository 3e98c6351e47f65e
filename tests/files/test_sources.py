"""What a model can be named by, and what is said of names that are none. The hub's part: test_hub.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.sources import locate


def folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for file in files:
        (path / file).write_text("{}")
    return path


def refused(source: str | Path, **options: str) -> str:
    with pytest.raises(CheckpointError) as error:
        locate(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path / "model-a", "config.json")
    run = folder(tmp_path / "run-a", "config.yaml")
    folder(run / "model", "config.json", "preprocessor_config.json")
    assert locate(model) == locate(str(model)) == model
    assert locate(run) == run / "model"
    assert locate(run, only="preprocessor_config.json") == run / "model"
    assert locate(tmp_path, subfolder="model-a") == model
    assert locate(model, "main") == model
    monkeypatch.chdir(tmp_path)
    assert locate("model-a") == Path("model-a")  # what is here goes before the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/model-a") == model


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    run = folder(tmp_path / "run-a", "config.yaml")
    assert f"`vitscale export {run}`" in refused(run)
    step = folder(run / "checkpoints" / "step_00000100", "manifest.json")
    assert f"`vitscale export {step}`" in refused(step)
    model = folder(tmp_path / "model-a", "config.json")
    assert "holds no preprocessor_config.json" in refused(model, only="preprocessor_config.json")
    assert "holds no config.json" in refused(tmp_path)
    assert "is a file; name the folder" in refused(model / "config.json")
    with pytest.raises(ConfigError, match=re.escape("revision='v1': is for the hub")):
        locate(model, "v1")


def test_paths_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder(tmp_path / "model-a", "config.json")
    assert refused(tmp_path / "model-b").endswith(f"no such folder; did you mean {model}?")
    assert refused(tmp_path / "other").endswith("other: no such folder")
    assert f"none of {tmp_path / 'none'}" in refused(tmp_path / "none" / "model-a")
    monkeypatch.chdir(tmp_path)
    assert refused("./model-b").endswith("no such folder; did you mean model-a?")
    assert refused("a/b/c/d").startswith("a/b/c/d: no such folder")
    assert refused("runs/").startswith("runs/: no such folder")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["best.pth", "log.txt"], "name what is in it: {}/best.pth"),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "name what is in it: {}/pytorch_model.bin"),
        (["latest", "step1/mp_rank_00_model_states.pt", "step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
         "name what is in it: {}/step1/mp_rank_00_model_states.pt"),
        (["checkpoints/last.ckpt", "hparams.yaml"], "name what is in it: {}/checkpoints/last.ckpt"),
        (["checkpoint-500/config.json", "checkpoint-500/model.safetensors"], "name what is in it: {}/checkpoint-500"),
        ([".metadata", "__0_0.distcp"], "format_utils dcp_to_torch {} weights.pth"),
        (["notes.txt"], "a model's folder has config.json and model.safetensors"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_models_says_what_to_name(tmp_path: Path, files: list[str], named: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert refused(tmp_path).endswith(
        f"holds no config.json; {named.format(tmp_path)}" if "dcp" not in named else named.format(tmp_path)
    )
