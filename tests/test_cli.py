"""The command line, verb by verb: what it prints, what it leaves, its exit code; an error is one line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscale import __version__
from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import SoleRank
from vitscale.cli import main
from vitscale.config.load import dump_config, load_config
from vitscale.data.index import ShardIndex
from vitscale.run_folder import BAD_INPUT, DONE, STOPPED, RunFolder

pytestmark = pytest.mark.usefixtures("environment")

VERBS = ("pretrain", "finetune", "doctor", "config", "pack", "index", "evaluate", "report", "stop", "save", "sync")
VERBS += (
    "stats",
    "look",
    "simulate",
    "replay",
    "plan",
    "submit",
    "chaos",
    "checkpoint",
    "convert",
    "predict",
    "features",
    "inspect",
    "export",
)
VERBS += ("bench",)
MODEL = """\
model: {hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16, image_size: 8,
        patch_size: 4}
objective:
  mae: {decoder_hidden_size: 8, decoder_num_hidden_layers: 1, decoder_num_attention_heads: 2,
        decoder_intermediate_size: 8}
data: {train: "shards/*.tar"}
train: {steps: 4}
tracking: {mlflow: false}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MODEL)
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line with which a command is refused."""
    assert main([str(word) for word in argv]) == BAD_INPUT
    said = capsys.readouterr()
    assert said.err.startswith("vitscale: error: ")
    assert said.err.count("\n") == 1
    return said.err


# ---- --help


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("argv", [*zip(VERBS, strict=True), ("bench", "data"), ("bench", "step"), ("bench", "model")])
def test_help_of_a_verb(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vitscale {' '.join(argv)} ")


def test_help_and_light_verbs_import_nothing_heavy(config: Path) -> None:
    program = """
import sys
import time
from vitscale.cli import main
for argv in (["--help"], ["--version"], ["evaluate", "--help"], ["config", sys.argv[1]]):
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    heavy = {"torch", "deepspeed", "accelerate", "mlflow", "transformers", "matplotlib", "sklearn"} & set(sys.modules)
    if code or heavy:
        sys.exit(f"{argv}: exit code {code}, imports {heavy}")
"""
    done = subprocess.run([sys.executable, "-c", program, config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "vitscale", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (DONE, f"vitscale {__version__}\n")


def test_unknown_verb_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["pretrian"], []):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == BAD_INPUT
        assert "VERB" in capsys.readouterr().err


def test_a_mistyped_option_names_the_nearest_and_the_verbs_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "reader", "a.png", "--topk", "3"])
    said = capsys.readouterr().err
    assert said.startswith("usage: vitscale predict ")
    assert said.splitlines()[-1].endswith("unrecognized arguments: --topk 3; did you mean --top-k?")


# ---- config


def test_config_prints_what_loads_back(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(config), "train.epochs=3", "run.name=other"]) == DONE
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(config, ["train.epochs=3", "run.name=other"])
    assert load_config(printed).train.steps is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", ("train.stpes", "train.steps")),
        ("train.steps=few", ("train.steps", "few")),
        ("parallel.zero_stage=4", ("parallel.zero_stage=4",)),
        ("train.micro_batch=48", ("train.global_batch=256", "train.micro_batch")),
        ("train.steps", ("train.steps", "=")),
    ],
)
def test_bad_override(config: Path, capsys: pytest.CaptureFixture[str], override: str, words: tuple[str, ...]) -> None:
    said = refused(capsys, "config", config, override)
    for word in words:
        assert word in said


def test_config_is_checked_for_the_ranks_asked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "3 ranks" in refused(capsys, "config", config, "--ranks", "3")
    assert main(["config", str(config), "--ranks", "4"]) == DONE


def test_config_for_no_ranks(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", str(config), "--ranks", "0"])
    assert ended.value.code == BAD_INPUT
    assert len(capsys.readouterr().err) < 1000


def test_no_such_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("config", "pretrain"):
        assert "nowhere.yaml" in refused(capsys, verb, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "argv",
    [("config", "nosuch"), ("stop", "nosuch"), ("sync", "nosuch"), ("report", "nosuch"), ("export", "nosuch"),
     ("index", "nosuch/*.tar", "--out", "i.json"), ("pack", "nosuch", "out"), ("predict", "./nosuch", "a.png"),
     ("inspect", "./nosuch"), ("convert", "./nosuch", "out", "--to", "hf")],
)  # fmt: skip
def test_a_verb_without_ranks_is_rank_0(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever the shell has: its error is printed, and what is ignored is said."""
    monkeypatch.chdir(tmp_path)
    left = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "http"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert main(argv) == BAD_INPUT
    ignored, error = capsys.readouterr().err.splitlines()
    assert all(f"{name}={value}" in ignored for name, value in left.items())
    assert error.startswith("vitscale: error: ")
    assert "nosuch" in error


# ---- pack, index


def images(folder: Path, *classes: str) -> Path:
    """20 small PNGs, in class folders or flat."""
    for number in range(20):
        inside = folder / classes[number % len(classes)] if classes else folder
        inside.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (12 * number, 0, 99)).save(inside / f"{number:02d}.png")
    return folder


def labelled(index: ShardIndex) -> int:
    """Samples with a label."""
    from vitscale.files.tar import scan_shard

    tables = [scan_shard(path) for path in index.paths]
    return sum("cls" in table.members(place) for table in tables for place in range(len(table.keys)))


def test_pack_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = images(tmp_path / "images", "cat", "dog"), tmp_path / "out"
    assert main(["pack", str(folder), str(out), "--shard-samples", "8", "--workers", "1"]) == DONE
    index = ShardIndex.load(out / "index.json")
    assert index.samples.tolist() == [8, 8, 4]
    assert labelled(index) == 20
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
    assert "20 images in 3 shards" in capsys.readouterr().out
    assert str(out) in refused(capsys, "pack", folder, out)


def test_pack_flat_with_held_out_images(tmp_path: Path) -> None:
    folder, out = images(tmp_path / "images"), tmp_path / "out"
    assert main(["pack", str(folder), str(out), "--held-out", "0.3", "--workers", "1"]) == DONE
    train, test = (ShardIndex.load(out / split / "index.json") for split in ("train", "test"))
    assert train.total + test.total == 20
    assert 0 < test.total < train.total
    assert labelled(train) == labelled(test) == 0
    assert not (out / "classes.json").exists()
    assert main(["pack", str(folder), str(tmp_path / "seed"), "--held-out", "0.3", "--seed", "1"]) == DONE
    other = ShardIndex.load(tmp_path / "seed" / "test" / "index.json")
    assert other.sha256 != test.sha256


def test_pack_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "images")
    lines = [f"{number:02d}.png,{number % 2},{number % 3 % 2},x" for number in range(20)]
    (folder / "list.csv").write_text("\n".join(["where,a,b,other", *lines]))
    argv = [str(folder / "list.csv"), str(tmp_path / "out"), "--label-column", "a", "--label-column", "b"]
    assert "where, a, b, other" in refused(capsys, "pack", *argv)
    assert main(["pack", *argv, "--image-column", "where", "--resize", "4"]) == DONE
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a", "b"]
    assert labelled(ShardIndex.load(tmp_path / "out" / "index.json")) == 20
    assert "labels are those of a, b" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [("--held-out", "1"), ("--held-out", "-0.1"), ("--shard-samples", "0")])
def test_pack_with_a_wrong_number(argv: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "images")
    name = argv[0].removeprefix("--").replace("-", "_")
    said = refused(capsys, "pack", folder, tmp_path / "out", *argv)
    assert name in said.replace("-", "_")
    assert argv[1] in said
    assert not (tmp_path / "out").exists()


def test_pack_with_too_few_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pack", str(images(tmp_path / "images")), str(tmp_path / "out"), "--workers", "0"])
    assert ended.value.code == BAD_INPUT
    assert "--workers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pack_into_a_place_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "file/out" in refused(capsys, "pack", images(tmp_path / "images"), tmp_path / "file" / "out")


def test_pack_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "pack", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "pack", tmp_path / "empty", tmp_path / "out")


def test_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `index` counts is what `pack` wrote, by a relative pattern and into a relative file too."""
    out = tmp_path / "out"
    main(["pack", str(images(tmp_path / "images")), str(out), "--shard-samples", "8", "--workers", "1"])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert main(["index", "out/*.tar", "--out", "again.json"]) == DONE
    assert capsys.readouterr().out == "again.json: 20 samples in 3 shards\n"
    packed, again = ShardIndex.load(out / "index.json"), ShardIndex.load(tmp_path / "again.json")
    assert again.digest == packed.digest
    assert again.sha256 == packed.sha256
    main(["index", "out/*.tar", "--out", "again.json", "--label", "txt"])
    assert {path.name.split(".", 2)[2] for path in (out / "index.tables").iterdir()} == {"cls.table", "txt.table"}
    assert "nowhere-*.tar" in refused(capsys, "index", "nowhere-*.tar", "--out", "none.json")
    assert "no/folder/index.json" in refused(capsys, "index", "out/*.tar", "--out", "no/folder/index.json")


# ---- a run's folder: export, stop, evaluate, sync


@pytest.fixture
def run(config: Path, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A run's folder with checkpoints of steps 2 and 4 (there every weight is doubled), and the weights at step 2."""
    from vitscale.models.auto import build_model, initialize

    loaded = load_config(config)
    model = build_model(loaded)
    initialize(model, seed=0)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    folder = RunFolder(tmp_path / "runs" / "run")
    folder.path.mkdir(parents=True)
    folder.config.write_text(dump_config(loaded))
    for step, scale in ((2, 1), (4, 2)):
        pieces = [Piece("param", name, w.shape, 0, scale * w.reshape(-1)) for name, w in weights.items()]
        save_checkpoint(folder.checkpoints, step, pieces, {"step": step}, SoleRank(), keep=3)
    return folder.path, weights


def assert_weights(model: Path, weights: dict[str, np.ndarray], scale: int) -> None:
    from vitscale.interop.pretrained import load_model

    parameters = dict(load_model(model).named_parameters())
    assert parameters.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(parameters[name].detach().numpy(), scale * value, err_msg=name)


def test_export_of_a_run(run: tuple[Path, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint, into the run's model/."""
    folder, weights = run
    assert main(["export", str(folder)]) == DONE
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "model")
    assert_weights(folder / "model", weights, scale=2)


@pytest.mark.parametrize(
    ("inside", "source", "scale"),
    [
        ("", "runs/run", 2),
        ("", "runs/run/", 2),
        ("runs/run", ".", 2),
        ("", "runs/run/checkpoints/step_00000002", 1),
        ("runs/run", "checkpoints/step_00000002", 1),
        ("runs/run/checkpoints", "step_00000002/", 1),
        ("runs/run/checkpoints/step_00000002", ".", 1),
    ],
)
def test_export_of_relative_paths(
    run: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inside: str,
    source: str,
    scale: int,
) -> None:
    monkeypatch.chdir(tmp_path / inside)
    assert main(["export", source, "--out", "exported"]) == DONE
    assert_weights(tmp_path / inside / "exported", run[1], scale)


def test_export_of_nothing(
    run: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere" in refused(capsys, "export", tmp_path / "nowhere")
    assert str(tmp_path) in refused(capsys, "export", tmp_path)
    damaged = run[0] / "checkpoints" / "step_00000002"
    (damaged / "manifest.json").write_text("{")
    assert "step_00000002" in refused(capsys, "export", damaged)


def test_export_onto_a_file(
    run: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(capsys, "export", run[0], "--out", tmp_path / "file")


def test_stop(run: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(run[0])
    with folder.locked():
        assert main(["stop", str(folder.path)]) == DONE
    assert folder.stop.exists()
    assert str(folder.stop) in capsys.readouterr().out
    assert "nowhere" in refused(capsys, "stop", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_stop_of_a_run_that_is_only_being_started(tmp_path: Path) -> None:
    """Its launcher looks at the data; there is no config in the folder yet."""
    folder = RunFolder(tmp_path)
    assert main(["stop", str(tmp_path)]) == BAD_INPUT
    folder.announce()
    assert main(["stop", str(tmp_path)]) == DONE
    assert folder.stop.exists()


def test_stop_of_a_run_that_nobody_runs(
    run: tuple[Path, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no run holds this folder" in refused(capsys, "stop", run[0])
    assert not RunFolder(run[0]).stop.exists()


def test_folders_that_are_no_finished_run(
    run: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model/" in refused(capsys, "evaluate", run[0])
    for verb in ("evaluate", "sync"):
        assert "nowhere: is no run folder" in refused(capsys, verb, tmp_path / "nowhere")
    main(["export", str(run[0])])
    capsys.readouterr()
    assert "'shards/*.tar'" in refused(capsys, "evaluate", run[0])
    assert "evaluation.tset" in refused(capsys, "evaluate", run[0], "evaluation.tset=test/*.tar")


def test_scores_again(run: tuple[Path, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate --show` prints what an evaluation has left, without work."""
    assert "no scores yet" in refused(capsys, "evaluate", "--show", run[0])
    scores = {"trained": {"linear_probe": 0.5, "linear_probe_se": 0.01, "knn": 0.25, "knn_se": 0.02}}
    RunFolder(run[0]).summary.write_text(json.dumps({"evaluation": {"scores": scores}}))
    assert main(["evaluate", "--show", str(run[0])]) == DONE
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("trained"))
    assert "50.0 +- 1.0 %" in row
    assert "25.0 +- 2.0 %" in row


@pytest.mark.parametrize(
    ("words", "help"),
    [
        (["configs/quickstart.yaml", "--train.steps", "3"], "write train.steps=VALUE"),
        (["configs/quickstart.yaml", "train.steps", "3"], "in one word, say train.steps=100"),
        (["run.name=x", "configs/quickstart.yaml"], "name the file first"),
    ],
)
def test_what_other_tools_would_take_is_answered_with_what_to_type(
    words: list[str], help: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=str(BAD_INPUT)):
        sys.exit(main(["config", *words]))
    assert help in capsys.readouterr().err


@pytest.mark.parametrize(
    ("closed", "said"), [("<&-", ""), (">&-", ""), ("<&- >&- 2>&-", ""), ("> /dev/full", "No space left")]
)
def test_streams_that_are_closed_or_full(closed: str, said: str, tmp_path: Path) -> None:
    """As daemons start processes."""
    command = f"{sys.executable} -m vitscale config configs/quickstart.yaml {closed}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, len(done.stderr.splitlines())) == ((1, 1) if said else (0, 0)), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_stopped_while_it_imports(number: signal.Signals, tmp_path: Path) -> None:
    """As by a scheduler: to be started again, and no crash."""
    command = [sys.executable, "-m", "vitscale", "pretrain", "configs/quickstart.yaml", f"run.dir={tmp_path}"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as process:
        status = Path(f"/proc/{process.pid}/status")
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (number - 1) & 1:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == STOPPED
    assert not list(tmp_path.iterdir())
