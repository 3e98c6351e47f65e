"""--take of the verbs that open a model: one set of weights of a file that has two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image

from tests.data.makers import encoded, write_shards
from tests.inference.conftest import save
from vitscale.cli import main
from vitscale.run_folder import BAD_INPUT, DONE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of one model: "student", "teacher", and "both", whose one file has the two sets of weights."""
    folder = tmp_path_factory.mktemp("models")
    student, both, teacher = (save(folder / name) for name in ("student", "both", "teacher"))
    weights = load_file(student / "model.safetensors")
    damped = {name: value * 0.5 for name, value in weights.items()}
    torch.save(damped, teacher / "pytorch_model.bin")
    torch.save({"student": weights, "teacher": damped}, both / "pytorch_model.bin")
    for each in (both, teacher):
        (each / "model.safetensors").unlink()
    (folder / "china.jpg").write_bytes(encoded(load_sample_image("china.jpg")))
    return {"student": student, "teacher": teacher, "both": both, "image": folder / "china.jpg"}


def test_predict(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def probabilities(*arguments: str) -> dict[str, float]:
        assert main(["predict", *arguments, str(models["image"]), "--format", "jsonl"]) == DONE
        row = json.loads(capsys.readouterr().out)
        return {each["label"]: each["probability"] for each in row["predictions"]}

    expected = {name: probabilities(str(models[name])) for name in ("student", "teacher")}
    assert expected["student"] != expected["teacher"]
    assert probabilities(str(models["both"])) == expected["teacher"]
    assert probabilities("--take", "student", str(models["both"])) == expected["student"]


def test_features(models: dict[str, Path], tmp_path: Path) -> None:
    def features(*arguments: str) -> np.ndarray:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert main(["features", *arguments, str(models["image"]), "--out", str(out)]) == DONE
        return np.load(next(out.glob("*.npy")))

    expected = features(str(models["student"]))
    np.testing.assert_array_equal(features("--take", "student", str(models["both"])), expected)
    assert not np.array_equal(features(str(models["both"])), expected)


@pytest.mark.parametrize("verb", ["convert", "export", "inspect"])
def test_what_is_written_or_shown(
    verb: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(model: str, *arguments: str) -> object:
        source, out = str(models[model]), tmp_path / model
        if verb == "inspect":
            assert main([verb, source, *arguments, "--gradients"]) == DONE
            return capsys.readouterr().out
        to = [str(out), "--to", "hf"] if verb == "convert" else ["--out", str(out), "--prune", "mlp", "0.25"]
        assert main([verb, source, *arguments, *to]) == DONE
        return {name: value.tolist() for name, value in load_file(out / "model.safetensors").items()}

    taken = result("both", "--take", "student")
    assert taken == result("student")
    assert taken != result("teacher")


def test_evaluate(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data", [20, 20])

    def scores(model: str, *arguments: str) -> object:
        out = tmp_path / f"{model}{len(arguments)}"
        keys = [f"evaluation.train={tmp_path}/data/*.tar", "data.lanes=1", "data.window=16", "evaluation.folds=2"]
        assert main(["evaluate", str(models[model]), *arguments, *keys, "--out", str(out)]) == DONE
        return json.loads((out / "summary.json").read_text())["evaluation"]["scores"]["trained"]

    assert scores("both", "--take", "student") == scores("student")
    assert scores("both") == scores("teacher")


def test_where_there_is_nothing_to_choose(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(models["both"]), "--take", "nobody", str(models["image"])]) == BAD_INPUT
    assert "take='nobody': names none of the sets of weights" in capsys.readouterr().err
    assert main(["export", str(models["both"]), "--take", "student"]) == BAD_INPUT
    assert "--take: is for" in capsys.readouterr().err
