"""`vitscale bench step` runs every contender, takes the fastest peer, and says whom it left out."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from vitscale.bench import step
from vitscale.errors import ConfigError

RUN = "--preset Ti --batch 1 --rounds 2 --device cpu --peak 0.5"


@pytest.mark.parametrize(
    ("objective", "peers"), [("mae", {"transformers eager"}), ("classification", {"transformers eager", "timm eager"})]
)
def test_measures_all_and_ends_with_json(objective: str, peers: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*RUN.split(), "--objective", objective]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peak_tflops"] == 0.5
    assert result["left_out"] == {}
    contenders = result["contenders"]
    assert set(contenders) == peers | {"vitscale eager"}
    for measured in contenders.values():
        assert len(measured["step_seconds"]) == 2
        assert measured["utilization"] == pytest.approx(
            measured["images_per_second"] * result["gflop_per_image"] / 500, rel=1e-6
        )
        assert 30 < measured["peak_memory_mib"] < 3000  # 6 to 8 million parameters, their gradients, twice that by Adam
        assert (0.3 < measured["loss"] < 3) if objective == "mae" else (4 < measured["loss"] < 10)
        assert measured["preparation_seconds"] > 0
    assert result["fastest_peer"] == min(peers, key=lambda name: statistics.median(contenders[name]["step_seconds"]))
    peer, own = (contenders[name]["step_seconds"] for name in (result["fastest_peer"], "vitscale eager"))
    assert contenders["vitscale eager"]["ratio"] == pytest.approx(
        statistics.median(theirs / ours for theirs, ours in zip(peer, own, strict=True))
    )


def test_who_fails_or_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("out of memory\nand more")

    exact = step.classifiers
    monkeypatch.setattr(step, "classifiers", lambda *args: {**exact(*args), "transformers": broken})
    monkeypatch.setattr(step, "EAGER", (("vitscale", False), ("transformers", False), ("vitscale", False)))
    seen = []
    arguments = [*RUN.split(), "--objective", "classification"]
    result = step.measure(arguments, note=lambda result: seen.append(list(result["contenders"])))
    assert result["left_out"] == {"transformers eager": "RuntimeError: out of memory"}
    assert result["contenders"]["vitscale eager"]["ratio"] is None
    assert seen == [["vitscale eager"]] * 2
    assert list(step.measure(arguments, most=1)["contenders"]) == ["vitscale eager"]
    late = step.measure([*arguments, "--seconds", "0"])
    assert set(late["left_out"]) == {"vitscale eager", "transformers eager"}
    assert late["contenders"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_missing_gpu_is_told() -> None:
    with pytest.raises(ConfigError, match="--device=cuda: torch sees no GPU"):
        step.main(["--device", "cuda"])
