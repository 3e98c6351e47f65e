"""`vitscale bench step` runs every contender, takes the fastest peer, and names those that it left out."""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vitscale.bench import peers, step
from vitscale.errors import ConfigError

RUN = "--preset Ti --batch 1 --rounds 2 --device cpu --peak 0.5"


class Norms:
    """Of the gradients that any optimizer is given within it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def _note(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.seen.append(float(nn.utils.get_total_norm(gradients)))

    def __enter__(self) -> None:
        self._hook = register_optimizer_step_pre_hook(self._note)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@pytest.mark.parametrize(
    ("objective", "libraries"),
    [("mae", {"transformers eager", "timm eager"}), ("classification", {"transformers eager", "timm eager"})],
)
def test_measures_all_and_ends_with_json(
    objective: str, libraries: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    norms = Norms()
    with norms:
        assert step.main([*RUN.split(), "--objective", objective]) == 0
    assert max(norms.seen) == pytest.approx(step.CLIP, rel=1e-3)
    printed = capsys.readouterr().out
    assert "of peak: images/s x " in printed
    assert " GFLOP an image (3 x the matrix products of a forward) / 0.50 TFLOP/s (given)" in printed
    result = json.loads(printed.splitlines()[-1])
    assert result["bench"] == "step"
    assert result["peak_tflops"] == 0.5
    assert result["left_out"] == {}
    contenders = result["contenders"]
    assert set(contenders) == libraries | {"vitscale eager"}
    for figure in contenders.values():
        assert len(figure["seconds"]) == 2
        assert figure["images_per_second"] == pytest.approx(1 / statistics.median(figure["seconds"]))
        assert figure["utilization"] == pytest.approx(figure["images_per_second"] * result["gflop_per_image"] / 500)
        assert 30 < figure["peak_memory_mib"] < 3000  # 6 to 8 million parameters, their gradients, twice that by Adam
        assert figure["preparation_seconds"] > 0
        assert figure["peak_reserved_mib"] is None
        assert list(figure["shares"]) == list(step.PARTS)
        assert all(share > 0 for share in figure["shares"].values())
        assert sum(figure["shares"].values()) == pytest.approx(1)  # the median of two rounds is their mean
    times = {name: contenders[name]["seconds"] for name in libraries}
    assert result["fastest_peer"] == min(libraries, key=lambda name: statistics.median(times[name]))
    rounds = zip(times[result["fastest_peer"]], contenders["vitscale eager"]["seconds"], strict=True)
    assert contenders["vitscale eager"]["ratio"] == pytest.approx(statistics.median(peer / own for peer, own in rounds))


def broken() -> nn.Module:
    raise RuntimeError("out of memory\nand more")


def not_finite(build: Any) -> nn.Module:
    model = build()
    nn.init.constant_(model.head.bias, torch.inf)
    return model


def test_a_contender_that_fails_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = peers.builders

    def builders(run: Any) -> dict[str, Any]:
        build = exact(run)
        return {**build, "timm": partial(not_finite, build["timm"]), "transformers": broken}

    monkeypatch.setattr(peers, "builders", builders)
    notes = []
    arguments = [*RUN.split(), "--objective", "classification"]
    result = step.measure(arguments, note=lambda so_far: notes.append(list(so_far["contenders"])))
    assert result["left_out"] == {
        "timm eager": "ArithmeticError: its second step gave values that are not finite",
        "transformers eager": "RuntimeError: out of memory",
    }
    assert result["contenders"]["vitscale eager"]["ratio"] is None
    assert result["fastest_peer"] is None
    assert notes == [["vitscale eager"]]
    assert list(step.measure(arguments, only=["vitscale eager"])["contenders"]) == ["vitscale eager"]


def test_without_time_none_begins() -> None:
    result = step.measure([*RUN.split(), "--seconds", "0"])
    names = ("vitscale eager", "timm eager", "transformers eager")
    assert result["left_out"] == dict.fromkeys(names, "no time left of 0 s")
    assert result["contenders"] == {}


def test_compiled_contenders_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    options = peers.models_parser("step", "a test").parse_args(
        ["--preset", "Ti", "--device", "cpu", "--compile", "--peak=1"]
    )
    comparison = peers.Comparison(options, peers.run_config("Ti", "mae"), trains=True)
    names = list(comparison.starts(partial(step.training_step, comparison)))
    peers_compiled = ["transformers compiled", "timm compiled"]
    assert names == ["vitscale compiled", "transformers eager", *peers_compiled, "vitscale eager"]
    assert torch._dynamo.config.recompile_limit == 64


def test_a_trace_has_a_step_of_each_by_part(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    arguments = [*RUN.split(), "--objective", "classification", "--rounds", "1", "--trace", str(trace)]
    assert list(step.measure(arguments, only=["vitscale eager"])["contenders"]) == ["vitscale eager"]
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert all(names.count(name) == 1 for name in ("vitscale eager", *step.PARTS))


@pytest.mark.gpu
def test_on_a_gpu_parts_are_timed_by_events_and_what_torch_holds_is_told(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["--preset", "Ti", "--batch", "2", "--rounds", "2", "--peak", "1", "--no-compile"]
    result = step.measure([*arguments, "--device", "cuda", "--trace", str(trace)], only=["vitscale eager"])
    (figure,) = result["contenders"].values()
    assert figure["peak_reserved_mib"] >= figure["peak_memory_mib"] > 0
    assert list(figure["shares"]) == list(step.PARTS)
    assert sum(figure["shares"].values()) == pytest.approx(1)
    assert any(event.get("cat") == "kernel" for event in json.loads(trace.read_text())["traceEvents"])


def test_a_trace_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--trace .*nowhere.*: must be a file in a folder that is there"):
        step.measure(["--trace", str(tmp_path / "nowhere" / "trace.json")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match="--device=cuda: torch sees no GPU"):
        step.main(["--device", "cuda"])
