"""`vitscale finetune` as it is used: from an encoder to scores, on any ranks and stages, stopped and gone on with."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from tests.data.makers import photo, write_tar
from tests.integration.conftest import make_images
from tests.integration.worlds import Launcher, losses, rows
from vitscale.conversion.convert import convert
from vitscale.interop.auto import AutoConfig
from vitscale.prepare.pack import pack

KEYS = """\
run: {{name: tuned, dir: {folder}}}
model: {{init_from: {encoder}}}
data: {{train: ["{shards}/*.tar"], validation_fraction: 0.2, lanes: 4, window: 32, decode: pillow, threads: 1}}
augment: {{preset: randaug, crop_scale: [0.6, 1.0], mixup: 0.2, cutmix: 0.0, erase: 0.0, rand_augment: null}}
optimizer: {{lr: 2.0e-3, lr_batch: null, layer_decay: 0.8, clip: 1.0, warmup: 0.1}}
train: {{global_batch: 16, micro_batch: 4, steps: 24, keep_best: validation/top1}}
parallel: {{timeout_s: 60}}
checkpoint: {{every_steps: 1000, keep: 1}}
evaluation: {{every_steps: 6, crop_fraction: 1.0, batch: 8}}
tracking: {{mlflow: false}}
log: {{every_steps: 1}}
"""


@pytest.fixture(scope="module")
def encoder(launcher: Launcher, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that pretraining by MAE left."""
    from tests.integration.conftest import write_config

    folder = tmp_path_factory.mktemp("encoder")
    launcher.run(["pretrain", str(write_config(folder, shards, folder)), "log.trace=false"])
    return folder / "run" / "model"


@pytest.fixture
def config(encoder: Path, shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(KEYS.format(folder=tmp_path, encoder=encoder, shards=shards))
    return path


def scored(run: Path) -> list[dict[str, Any]]:
    """The rows with scores."""
    return [row for row in rows(run) if "validation/loss" in row]


def test_scores_are_the_same_on_any_ranks_and_stages(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    found = []
    for ranks, stage in ((1, 0), (2, 3), (4, 2)):
        name = f"tuned-{ranks}"
        launcher.run(["finetune", str(config), f"run.name={name}", f"parallel.zero_stage={stage}"], ranks=ranks)
        run = tmp_path / name
        summary = json.loads((run / "summary.json").read_text())
        found.append((losses(run), scored(run), summary["best"]))
    curve, scores, best = found[0]
    assert [row["step"] for row in scores] == [6, 12, 18, 24]
    assert best["value"] == max(row["validation/top1"] for row in scores)
    assert 15 < scores[0]["validation/images"] < 45
    for other_curve, other_scores, other_best in found[1:]:
        assert other_curve == pytest.approx(curve, rel=1e-5)
        for row, other in zip(scores, other_scores, strict=True):
            assert other["validation/loss"] == pytest.approx(row["validation/loss"], rel=1e-5)
            assert other["validation/images"] == row["validation/images"]
            assert abs(other["validation/top1"] - row["validation/top1"]) * row["validation/images"] <= 1.001
        assert other_best["step"] == best["step"]


def test_the_best_is_kept_and_reproduced_by_transformers(
    launcher: Launcher, config: Path, shards: Path, tmp_path: Path
) -> None:
    """Scored on shards of their own; the first scores are the best, since the learning rate is none."""
    argv = [
        "finetune",
        str(config),
        "optimizer.lr=1e-9",
        "evaluation.crop_fraction=0.7",
        "data.validation_fraction=0",
        f"data.validation={shards}/*.tar",
    ]
    launcher.run([*argv, "train.early_stopping=2"])
    run = tmp_path / "tuned"
    summary = json.loads((run / "summary.json").read_text())
    best = summary["best"]
    assert (best["step"], summary["steps"]) == (6, 18), "stopped early, two validations after the best"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000006", "step_00000018"]
    model = transformers.AutoModelForImageClassification.from_pretrained(run / "model").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(run / "model")
    right = total = 0
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in members:
            if name.endswith(".png"):
                inputs = processor(Image.open(io.BytesIO(members[name])).convert("RGB"), return_tensors="pt")
                with torch.no_grad():
                    answer = int(model(**inputs).logits.argmax())
                right += answer == int(members[name.replace(".png", ".cls")])
                total += 1
    assert total == best["scores"]["validation/images"] == 150
    assert abs(right / total - best["value"]) * total <= 1.001
    assert {path.stem for path in (run / "figures").iterdir()} == {"loss", "neighbours", "patches"}
    table = json.loads((run / "validation.json").read_text())
    assert [row["class"] for row in table["classes"]] == ["class0", "class1", "class2"]
    assert sum(map(sum, table["confusion"])) == 150
    before = (run / "metrics.jsonl").read_text()
    launcher.run([*argv, "train.early_stopping=2"])
    assert (run / "metrics.jsonl").read_text() == before, "the same command trains nothing more"


def test_stopped_and_resumed_is_bit_identical(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """And a validation changes no bit of what follows."""
    argv = ["finetune", str(config), "train.ema_decay=0.9", "checkpoint.keep=9", "checkpoint.every_steps=8"]
    argv.append("checkpoint.asynchronous=false")
    launcher.run([*argv, "run.name=whole"], ranks=2)
    said = launcher.run([*argv, "run.name=quiet", "evaluation.every_steps=null"], ranks=2)
    assert "warning: train.keep_best=validation/top1: only the end is scored" in said
    whole, quiet = tmp_path / "whole", tmp_path / "quiet"
    state = "checkpoints/step_00000024/state-00001.safetensors"
    expected = load_file(whole / state)
    other = load_file(quiet / state)
    assert all(torch.equal(expected[name], other[name]) for name in expected)
    raw = [row for row in scored(whole) if "validation/raw_loss" in row]
    assert len(raw) == 4
    assert all(row["validation/raw_loss"] != row["validation/loss"] for row in raw)
    before, best = scored(whole), json.loads((whole / "summary.json").read_text())["best"]
    for name in ("checkpoints/step_00000024", "checkpoints/step_00000018", "model"):
        shutil.rmtree(whole / name, ignore_errors=True)
    (whole / "summary.json").unlink()
    launcher.run([*argv, "run.name=whole"], ranks=2)  # from step 16, whose rows of 18 and 24 are written again
    again = load_file(whole / state)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    kept = [{name: value for name, value in row.items() if name.startswith("validation/")} for row in scored(whole)]
    assert kept == [{name: value for name, value in row.items() if name.startswith("validation/")} for row in before]
    assert json.loads((whole / "summary.json").read_text())["best"] == best


def test_frozen_blocks_stay_and_the_rest_moves(launcher: Launcher, config: Path, encoder: Path, tmp_path: Path) -> None:
    before = load_file(encoder / "model.safetensors")
    for blocks, moved in ((1, {"vit.encoder.layer.1"}), (-1, set())):
        name = f"frozen{blocks}"
        launcher.run(["finetune", str(config), f"run.name={name}", f"train.freeze={blocks}", "train.steps=3"])
        after = load_file(tmp_path / name / "model" / "model.safetensors")
        changed = {key for key in before if key in after and not torch.equal(before[key], after[key])}
        prefixes = {key.rpartition(".attention")[0].rpartition(".")[0] or key for key in changed}
        assert all("layer.1" in key or "layernorm.weight" in key or "layernorm.bias" in key for key in changed), (
            prefixes
        )
        assert bool(changed) == bool(moved)
        assert after["classifier.weight"].std() > 0


def test_a_folder_of_images(launcher: Launcher, encoder: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    path = tmp_path / "config.yaml"
    path.write_text(KEYS.format(folder=tmp_path, encoder=encoder, shards="X").replace("X/*.tar", str(images)))
    launcher.run(["finetune", str(path), "train.steps=2"])
    summary = json.loads((tmp_path / "tuned" / "summary.json").read_text())
    assert summary["images"] == 126, "without those that are validated on"
    model = json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
    assert model["id2label"] == {"0": "class0", "1": "class1", "2": "class2"}
    run = tmp_path / "tuned"
    assert "packed" in (run / "config.yaml").read_text()
    last = scored(run)[-1]
    launcher.run(["evaluate", str(run)], ranks=2)  # on what the run set apart
    own = json.loads((run / "summary.json").read_text())["evaluation"]
    assert own["test"] == own["test_scores"]["test/images"] == last["validation/images"] == 24
    assert own["train"] == 126
    assert own["test_scores"]["test/top1"] == pytest.approx(last["validation/top1"], abs=1.001 / 24)
    launcher.run(["evaluate", str(run / "model"), "--out", str(tmp_path / "out"), f"evaluation.test={images}"])
    own = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]
    assert own["test_scores"]["test/images"] == 150, "a classifier needs no images to fit on"
    assert own["scores"] == {}
    assert "to have them packed again" not in launcher.run(["finetune", str(path), "train.steps=3"])
    (images / "class0" / "another.png").write_bytes(next((images / "class0").glob("*.png")).read_bytes())
    said = launcher.run(["finetune", str(path), "train.steps=4"], code=2)
    assert re.search(r"packed: was packed of other images than .*/images has now; name another run", said)


def test_folders_named_by_numbers_one_of_them_absent_from_validation(
    launcher: Launcher, encoder: Path, tmp_path: Path
) -> None:
    """Labels are the places of the training's folders: 1, 10, 2, whatever their names look like."""
    images = make_images(tmp_path / "images")
    for old, new in (("class0", "1"), ("class1", "2"), ("class2", "10")):
        (images / old).rename(images / new)
    held_out = tmp_path / "held_out"
    shutil.copytree(images, held_out)
    shutil.rmtree(held_out / "10")
    path = tmp_path / "config.yaml"
    path.write_text(KEYS.format(folder=tmp_path, encoder=encoder, shards="X").replace("X/*.tar", str(images)))
    keys = ["data.validation_fraction=0", f"data.validation={held_out}", "train.steps=2"]
    launcher.run(["finetune", str(path), *keys])
    content = json.loads((tmp_path / "tuned" / "validation.json").read_text())
    assert {row["class"]: row["images"] for row in content["classes"]} == {"1": 50, "10": 0, "2": 50}


def test_shards_whose_classes_are_numbered_otherwise(
    launcher: Launcher, config: Path, shards: Path, tmp_path: Path
) -> None:
    images = make_images(tmp_path / "images")
    shutil.rmtree(images / "class0")
    pack(images, tmp_path / "fewer", workers=1)
    keys = ["data.validation_fraction=0", f"data.validation={tmp_path}/fewer/*.tar"]
    output = launcher.run(["finetune", str(config), *keys], code=2)
    assert "data.validation: classes.json beside its shards says class1, class2, that of training class0" in output
    assert "--classes" in output
    sides = [f"evaluation.train={shards}/*.tar", f"evaluation.test={tmp_path}/fewer/*.tar"]
    assert "evaluation.test: classes.json" in launcher.run(["finetune", str(config), *sides], code=2)
    both = f"data.train=['{shards}/*.tar', '{tmp_path}/fewer/*.tar']"
    for keys in ([both], [both, "model.num_labels=3"]):
        assert "a label would mean two classes" in launcher.run(["finetune", str(config), *keys], code=2)


@pytest.mark.parametrize(
    ("kind", "labels", "score"),
    [
        ("multi_label_classification", lambda i: f"{i % 2} {int(i % 3 == 0)}", "map"),
        ("regression", lambda i: f"{i / 9}", "r2"),
    ],
)
def test_several_labels_and_numbers(
    launcher: Launcher, config: Path, tmp_path: Path, kind: str, labels: Any, score: str
) -> None:
    members = []
    for number in range(40):
        members += [(f"{number:04d}.jpg", photo(number)), (f"{number:04d}.label", labels(number).encode())]
    write_tar(tmp_path / "a.tar", members)
    argv = ["finetune", str(config), f"model.problem_type={kind}", f"data.train={tmp_path}/a.tar", "data.label=label"]
    argv += ["train.steps=4", f"train.keep_best=validation/{score}", "augment.mixup=0", "data.validation_fraction=0.3"]
    launcher.run([*argv, *(["model.num_labels=2"] if "multi" in kind else [])], ranks=2)
    assert f"validation/{score}" in scored(tmp_path / "tuned")[-1]
    config_json = json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
    assert config_json["problem_type"] == kind


def test_balanced_classes_are_weighted_alike_on_any_ranks(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    members = []
    for number in range(60):
        label = b"0001120001"[number % 10 : number % 10 + 1]  # 6 to 3 to 1
        members += [(f"{number:04d}.jpg", photo(number)), (f"{number:04d}.cls", label)]
    write_tar(tmp_path / "a.tar", members)
    argv = ["finetune", str(config), f"data.train={tmp_path}/a.tar", "model.num_labels=3", "train.steps=3"]
    argv += ["data.validation_fraction=0", "train.keep_best=null"]
    weighted, curves = "objective.classification.class_weights=balanced", []
    for name, ranks, keys in (("plain", 1, []), ("one", 1, [weighted]), ("two", 2, [weighted])):
        launcher.run([*argv, *keys, f"run.name={name}"], ranks=ranks)
        curves.append(losses(tmp_path / name))
    assert curves[2] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] != pytest.approx(curves[1], rel=1e-3)


def test_other_image_size_and_channels(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    argv = ["finetune", str(config), "model.image_size=24", "model.num_channels=1", "augment.mean=[0.5]"]
    launcher.run([*argv, "augment.std=[0.25]", "train.steps=2"])
    content = json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
    assert (content["image_size"], content["num_channels"]) == (24, 1)


def refusal(launcher: Launcher, *argv: str) -> str:
    world = launcher.start(["finetune", *argv], 1)
    assert world.wait() == [2]
    (line,) = [line for line in world.output().splitlines() if line.startswith("vitscale: error: ")]
    return line


def test_what_cannot_be_learned_is_a_line(launcher: Launcher, config: Path, encoder: Path, tmp_path: Path) -> None:
    def shard(name: str, labels: list[str | None], classes: list[str] | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        members = []
        for number, label in enumerate(labels):
            members.append((f"{number:04d}.jpg", photo(number)))
            members += [] if label is None else [(f"{number:04d}.cls", label.encode())]
        write_tar(folder / "a.tar", members)
        if classes is not None:
            (folder / "classes.json").write_text(json.dumps(classes))
        return f"data.train={folder}/*.tar"

    many = [str(number % 3) for number in range(60)]
    base = str(config)
    none = shard("none", [None] * 40)
    assert "no member has the extension data.label='cls'" in refusal(launcher, base, none, "model.num_labels=3")
    assert "model.num_labels: is not written, and no classes.json" in refusal(launcher, base, shard("unknown", many))
    said = refusal(launcher, base, shard("range", many), "model.num_labels=2")
    assert "18 of 52 labels are not what single_label_classification needs" in said
    assert "2, with model.num_labels=2" in said
    one_based = [str(number % 3 + 1) for number in range(60)]
    said = refusal(launcher, base, shard("based", one_based), "model.num_labels=3")
    assert "they count from 1 to 3: write them from 0 to 2" in said
    held_out = [f"data.validation={tmp_path}/based/*.tar", "data.validation_fraction=0", "model.num_labels=3"]
    said = refusal(launcher, base, f"data.train={tmp_path}/range/*.tar", *held_out)
    assert "of what is validated on, 20 of 60 labels are not what single_label_classification needs" in said
    assert "no such file or folder; check the path" in refusal(launcher, base, f"data.train={tmp_path}/nofolder")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.jpg").write_bytes(photo(1))
    assert "put the images into one folder a class" in refusal(launcher, base, f"data.train={tmp_path}/flat")
    said = refusal(launcher, base, shard("single", ["1"] * 40), "model.num_labels=3")
    assert "every image has the label 1; a classifier needs two classes" in said
    words = shard("words", ["cat", "dog"] * 30)
    said = refusal(launcher, base, words, "model.num_labels=2")
    assert "'cat' is no whole number" in said
    assert "model.id2label=[cat, dog] or a classes.json beside the shards" in said
    named = shard("named", many, ["a", "b", "c"])
    said = refusal(launcher, base, named, "model.id2label=[x,y,z]")
    assert "model.id2label is x, y, z, and classes.json beside the shards says a, b, c" in said
    said = refusal(launcher, base, f"data.train={tmp_path}/named/*.tar", "model.num_labels=1000")
    assert "model.num_labels=1000: classes.json beside the shards names 3 classes" in said
    said = refusal(launcher, base, f"data.train={tmp_path}/range/*.tar", "model.num_labels=3", "model.hidden_size=48")
    assert "of another shape" in said
    assert "train.micro_batch=1 is odd" in refusal(launcher, base, "train.micro_batch=1")
    said = refusal(launcher, base, "augment.steps=[spin]")
    assert "must be one of brightness" in said
    said = refusal(launcher, base, "train.keep_best=validation/top2", "train.steps=1")
    assert "train.keep_best=validation/top2: must be one of validation/loss, validation/top1" in said
    one = make_images(tmp_path / "one")
    shutil.rmtree(one / "class0")
    shutil.rmtree(one / "class1")
    assert "class2 is its only class, and a classifier needs two" in refusal(launcher, base, f"data.train={one}")
    said = refusal(launcher, base, "data.validation_fraction=0", "run.name=other")
    assert "train.keep_best=validation/top1: there is nothing to score" in said
    (tmp_path / "empty").mkdir()
    said = refusal(launcher, base, f"data.validation={tmp_path}/empty/*.tar", "data.validation_fraction=0")
    assert "empty/*.tar': no such file" in said
    assert "objective.name=mae: vitscale finetune trains on labels" in refusal(launcher, base, "objective.name=mae")


def test_a_classifier_of_other_classes(launcher: Launcher, config: Path, shards: Path, tmp_path: Path) -> None:
    launcher.run(["finetune", str(config), "train.steps=1", "run.name=first"])
    other = tmp_path / "other"
    images = make_images(tmp_path / "images")
    for number in range(3):
        (images / f"class{number}").rename(images / f"kind{number}")
    pack(images, other, workers=1)
    said = refusal(launcher, str(config), f"model.init_from={tmp_path}/first/model", f"data.train={other}/*.tar")
    assert "its classes are class0, class1, class2, those of the data kind0, kind1, kind2" in said
    assert "start from its encoder alone" in said


def test_an_encoder_of_timm(launcher: Launcher, config: Path, encoder: Path, tmp_path: Path) -> None:
    """Its sizes are written, its classes are not asked for."""
    convert(encoder, tmp_path / "timm", "timm")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    sizes = [f"model.{name}={getattr(AutoConfig.from_pretrained(encoder), name)}" for name in names]
    launcher.run(["finetune", str(config), f"model.init_from={tmp_path}/timm", "train.steps=1", *sizes])
