"""Each stage fails where what it measures is wrong: its parts are replaced by ones that give given results."""

from __future__ import annotations

import gzip
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.bench.gpu_suite.stages import make_setting
from vitscale.augment.operations import ModelInputs
from vitscale.bench.gpu_suite import augmentation, correctness, gpu_tests, pretraining, profiling, sharding, steps
from vitscale.bench.gpu_suite.cases import Mismatch
from vitscale.bench.gpu_suite.training import Training, gradient_distances
from vitscale.checkpoint.fragments import Piece
from vitscale.config.load import load_config
from vitscale.engine.engine import StepResult
from vitscale.models.auto import build_model

LOSSES = [4.0, 3.0, 2.0, 1.0]
ONES, HALVES = ({"a": np.ones(3, np.float32), "b": values} for values in (np.ones(2), np.full(2, 0.5)))


class GivenTraining:
    """In place of Training: the given losses by step, the given weights in the end."""

    def __init__(self, losses: list[float], weights: dict[str, np.ndarray]) -> None:
        self.losses, self.end = losses, weights
        self.backend = SimpleNamespace(device=torch.device("cpu"))

    def steps(self, first: int, end: int) -> list[float]:
        return self.losses[first:end]

    def weights(self) -> dict[str, np.ndarray]:
        return self.end

    def save(self, root: Path, step: int) -> Path:
        root.mkdir()
        return root / str(step)

    def __enter__(self) -> GivenTraining:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def give_trainings(monkeypatch: pytest.MonkeyPatch, *trainings: GivenTraining) -> list[Path | None]:
    """The next ones are these; the checkpoints that they start from."""
    upcoming, checkpoints = iter(trainings), []

    def make(config: Any, world: Any, checkpoint: Path | None = None) -> GivenTraining:
        checkpoints.append(checkpoint)
        return next(upcoming)

    monkeypatch.setattr(correctness, "Training", make)
    return checkpoints


@pytest.mark.parametrize(("losses", "weights", "equal", "words"), [
    (LOSSES, ONES, True, "the same bits"),
    ([4.0, 3.0, 2.0, 1.0000001], ONES, False, "in 0 of 2 parameters"),
    (LOSSES, HALVES, False, "in 1 of 2 parameters"),
])  # fmt: skip
def test_resuming_compares_losses_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], weights: Any, equal: bool, words: str
) -> None:
    checkpoints = give_trainings(monkeypatch, GivenTraining(LOSSES, ONES), GivenTraining(losses, weights))
    found = correctness.compare_resumed(correctness.small_config("mae"), tmp_path / "saved")
    assert checkpoints == [None, tmp_path / "saved" / "2"]
    assert found["equal"] == equal
    assert words in found["text"]
    assert found["losses"] == LOSSES
    assert list(tmp_path.iterdir()) == []


def test_other_bits_fail_with_deterministic_algorithms_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "compare_resumed", lambda config, folder: {"equal": False, "text": "other bits"})
    cases = correctness.resume_cases(make_setting(tmp_path))
    assert cases["ZeRO-0"]() == {"equal": False, "text": "other bits"}
    with pytest.raises(Mismatch, match="with deterministic algorithms, other bits"):
        cases["ZeRO-0 deterministic"]()


@pytest.mark.parametrize(("losses", "weights", "resumed", "words"), [
    (LOSSES, ONES, True, None),
    ([4.0, 3.0, 2.0, 1.01], ONES, True, "fp32: losses 1.0e-02 off"),
    (LOSSES, HALVES, True, "fp32: losses 0.0e"),
    (LOSSES, ONES, False, "resumed at step 2, other bits"),
])  # fmt: skip
def test_steps_are_compared_with_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], weights: Any, resumed: bool, words: str | None
) -> None:
    start = {name: np.zeros_like(values) for name, values in ONES.items()}
    monkeypatch.setattr(correctness, "reference", lambda config, steps: (LOSSES, start, ONES))
    monkeypatch.setattr(correctness, "compare_resumed", lambda *_: {"equal": resumed, "text": "other bits"})
    give_trainings(monkeypatch, GivenTraining(losses, weights), GivenTraining(losses, weights))
    case = correctness.cases(make_setting(tmp_path))["ZeRO-2"]
    if words is None:
        assert case()["fp32"]["loss_distance"] == 0
    else:
        with pytest.raises(Mismatch, match=words):
            case()


def test_a_gradient_near_0_is_measured_against_all() -> None:
    expected = {"large": torch.full((4,), 10.0), "bias": torch.full((4,), 1e-9)}
    found = {"large": torch.full((4,), 10.0), "bias": torch.full((4,), 1e-5)}
    assert gradient_distances(found, expected)[1] == pytest.approx(1e-3, rel=0.01)


def test_training_refuses_a_skipped_step_and_joins_pieces_in_order() -> None:
    training = object.__new__(Training)
    training.config = correctness.small_config("mae")
    result = StepResult(1.0, {}, torch.tensor(float("inf")), applied=False)
    pieces = [Piece("param", "w", (4,), start, np.full(2, start)) for start in (2, 0)]
    pieces.append(Piece("ema", "w", (4,), 0, np.ones(4)))
    training.engine = SimpleNamespace(  # type: ignore[assignment]
        accumulation=1, step=lambda micro_batches, lr: result, snapshot=lambda: pieces
    )
    with pytest.raises(Mismatch, match="step 3 was skipped: its gradient norm was inf"):
        training.steps(2, 3)
    assert training.weights()["w"].tolist() == [0, 0, 2, 2]


def test_figures_of_a_run_are_those_of_its_warm_steps(tmp_path: Path) -> None:
    cold, warm = {"step_seconds": 9.0, "data_share": 0.9}, {"data_share": 0.25}
    rows = [cold | {"loss": 2.0}] * pretraining.WARM
    rows += [warm | {"step_seconds": 0.4 + 0.2 * (number % 2), "loss": 1.0} for number in range(40)]
    summary = {"peak_memory_bytes": [1 << 30, 3 << 30], "decoder": "pillow", "skipped_steps": 0, "bad_samples": {}}
    asked = ["train.global_batch=256", "train.micro_batch=256"]
    setting = make_setting(tmp_path, a={"matrix": {"tflops": 100.0}})
    figures = pretraining._figures(rows, summary, asked, setting)
    with torch.device("meta"):
        flops = build_model(load_config(str(pretraining.RECIPE))).flops_per_image()
    assert figures["images_per_second"] == pytest.approx(256 / 0.5)
    assert figures["utilization"] == pytest.approx(512 * flops / 100e12)
    assert figures["data_share"] == pytest.approx(0.25)
    assert figures["peak_memory_gib"] == 3
    assert figures["losses"] == [2.0] * pretraining.WARM + [1.0] * 40
    assert figures["text"].startswith("512 images/s, ")


def test_a_step_without_ours_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"contenders": {"timm eager": {"images_per_second": 1.0, "utilization": 0.1, "ratio": None}},
              "left_out": {"vitscale eager": "out of memory"}}  # fmt: skip
    monkeypatch.setattr(steps.step, "measure", lambda arguments, note, only: result)
    with pytest.raises(Mismatch, match=r"no model of ours could be measured: .*out of memory"):
        steps.cases(make_setting(tmp_path))["mae Ti"]()


def test_graphs_are_apart_from_the_ratio_to_peers() -> None:
    """Whose peers may have none; a ratio is None where there was no peer."""
    ratios = {
        "vitscale compiled": 1.2,
        "transformers eager": 1.0,
        "vitscale by CUDA graphs": 1.6,
        "vitscale eager": 0.9,
    }
    contenders = {
        name: {"images_per_second": 1.0, "utilization": 0.1, "ratio": ratio} for name, ratio in ratios.items()
    }
    text = steps._with_text({"contenders": contenders, "left_out": {}})["text"]
    assert text.endswith(", ratio 1.20, by CUDA graphs 1.60")
    alone = {"contenders": {"vitscale eager": contenders["vitscale eager"] | {"ratio": None}}, "left_out": {}}
    assert steps._with_text(alone)["text"] == "images/s: vitscale eager 1.0 (10%)"


def test_contenders_end_before_their_case_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(arguments: list[str], note: Any, only: Any) -> dict[str, Any]:
        asked.extend(arguments)
        return {"contenders": {}, "left_out": {}}

    monkeypatch.setattr(steps.step, "measure", measure)
    setting = make_setting(tmp_path)
    setting.case_deadline = time.monotonic() + 200
    with pytest.raises(Mismatch):
        steps.cases(setting)["mae Ti"]()
    assert 100 < float(asked[asked.index("--seconds") + 1]) <= 160


@pytest.mark.parametrize(("apart", "passes"), [(0.005, True), (0.02, False), (float("nan"), False)])
def test_augmentation_is_compared_in_units_of_255(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: float, passes: bool
) -> None:
    """apart: the device's values minus the CPU's, of 255."""

    differences, of = iter((0.0, apart)), augmentation.Augment.of

    def off(config: Any, device: str, train: bool) -> Any:
        augment, shift = of(config, device, train), next(differences) / 255 / torch.tensor(config.augment.std)

        def call(batch: Any) -> ModelInputs:
            inputs = augment(batch)
            return replace(inputs, pixel_values=inputs.pixel_values + shift.view(-1, 1, 1))

        return call

    monkeypatch.setattr(augmentation.Augment, "of", off)
    case = augmentation.cases(make_setting(tmp_path))["matrix products highest"]
    if passes:
        assert case()["largest_difference"] == pytest.approx(apart, rel=0.02)
    else:
        with pytest.raises(Mismatch, match="of 255 off the CPU's"):
            case()


@pytest.mark.parametrize("kept", [False, True])
def test_a_trace_that_is_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    content = gzip.compress(b'{"traceEvents": []}')
    monkeypatch.setattr(profiling, "MOST_BYTES", len(content) - (not kept))
    profiler = SimpleNamespace(export_chrome_trace=lambda path: Path(path).write_bytes(content))
    assert profiling._trace(profiler, make_setting(tmp_path), "trace.json.gz")["trace_bytes"] == len(content)
    assert (tmp_path / "trace.json.gz").exists() == kept


@pytest.mark.parametrize(("told", "words"), [
    ({"losses": [1.0], "seconds": 0.2, "allocated_bytes": 2e6}, "40.0 images/s, 2 MB, 0.50 of DDP's speed"),
    ({"planned_bytes": 9e9, "error": "no memory", "out_of_memory": True}, "no memory; planned: 9.00 GB"),
    ({"losses": [1.02], "seconds": 0.2}, None),
    ({"planned_bytes": 9e9, "error": "its process ended", "out_of_memory": False}, None),
])  # fmt: skip
def test_a_stage_without_room_is_a_finding_and_another_loss_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], words: str | None
) -> None:
    monkeypatch.setattr(sharding, "measured", lambda *_: dict(told))
    setting = make_setting(tmp_path, k={"tiny DDP": {"losses": [1.0], "seconds": 0.1}})
    case = sharding.cases(setting)["tiny ZeRO-2"]
    if words is not None:
        assert case()["text"] == words
    else:
        with pytest.raises(Mismatch):
            case()


TESTS = """
import pytest
pytestmark = pytest.mark.MARK
@pytest.fixture
def broken(): raise ValueError
def test_good(): pass
def test_bad(): assert False
def test_broken(broken): pass
"""


def test_failures_and_errors_of_pytest_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "_ROOT", tmp_path)
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_it.py").write_text(TESTS.replace("MARK", "gpu"))
    case = gpu_tests.cases(make_setting(tmp_path))["pytest"]
    named = r"ended with 1: tests/gpu/test_it.py::test_bad, tests/gpu/test_it.py::test_broken"
    with pytest.raises(Mismatch, match=named):
        case()
    assert '"text": "1 passed, 1 failed, 1 error"' in (tmp_path / "lines.jsonl").read_text()
