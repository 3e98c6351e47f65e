"""The verbs `vitscale checkpoint`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.manifest import as_text
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import SoleRank, folder_name, open_checkpoint
from vitscale.cli import main
from vitscale.config.load import config_of, dump_config
from vitscale.errors import CheckpointError
from vitscale.run.start import require_of_run
from vitscale.run_folder import BAD_INPUT, DONE

BEST = {"metric": "validation/loss", "value": 1.0, "step": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that keeps its newest two: checkpoints of steps 2 (its best), 4 and 6; each adds 1 to a weight."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config_of({"checkpoint.keep": 2}, [])))
    for step in (2, 4, 6):
        changing, same = np.full(6, step / 2, np.float32), np.arange(4, dtype=np.float32)
        pieces = [Piece("param", "head.weight", (2, 3), 0, changing), Piece("buffer", "table", (4,), 0, same)]
        state = {"step": step, "world_size": 3, "zero_stage": 2, "time": 1_800_000_000_000, "best": BEST}
        save_checkpoint(run / "checkpoints", step, pieces, state, SoleRank(), keep=9)
    return run


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / folder_name(number)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (step(run, 4) / "state-00000.safetensors").unlink()
    assert main(["checkpoint", "ls", str(run)]) == DONE
    header, newest, broken, best = (line.split(maxsplit=6) for line in capsys.readouterr().out.splitlines())
    assert header == ["step", "saved", "GB", "ranks", "ZeRO", "state", "kept"]
    assert newest[0] == "6"
    assert newest[1].startswith("2027-01-15")
    assert newest[-1].split(maxsplit=1) == ["whole", "one of the newest 2"]
    assert broken[-1] == "state-00000.safetensors is missing  one of the newest 2"
    assert best[-1].split(maxsplit=1) == ["whole", "the best"]
    assert main(["checkpoint", "ls", str(run.parent)]) == BAD_INPUT


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == DONE
    assert capsys.readouterr().out.count(": whole\n") == 3
    flip(step(run, 4) / "state-00000.safetensors")
    assert main(["checkpoint", "verify", str(run)]) == BAD_INPUT
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(": whole") for line in lines] == [True, False, True]
    assert "its bytes have changed" in lines[1]
    assert main(["checkpoint", "verify", str(step(run, 6))]) == DONE


def test_a_forged_manifest_costs_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever verb reads it; nothing of it is exported."""
    path = step(run, 6) / "manifest.json"
    manifest = json.loads(path.read_text())
    for tensor in manifest["tensors"]:
        tensor["pieces"] = []
    path.write_text(as_text(manifest))
    assert main(["checkpoint", "verify", str(step(run, 6))]) == BAD_INPUT
    assert main(["checkpoint", "ls", str(run)]) == DONE
    assert capsys.readouterr().out.count("pieces of 0 elements, and 4 are its shape's, which no save writes") == 2
    assert main(["checkpoint", "diff", str(step(run, 6)), str(step(run, 4))]) == BAD_INPUT
    assert main(["export", str(step(run, 6)), "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_no_run(run: Path) -> None:
    with pytest.raises(CheckpointError, match="says no samples, adam_step, order, model, total_steps, decoder of a"):
        require_of_run(open_checkpoint(step(run, 6), SoleRank()))


def test_diff(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", str(step(run, 2)), str(run)]) == DONE
    out = capsys.readouterr().out
    assert "param  head.weight  2 (6 of 6 elements)" in out
    assert "1 tensors are equal, 1 differ" in out
    assert "state: step: 2, 6" in out
    assert "config" not in out
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(dump_config(config_of({"checkpoint.keep": 2, "optimizer.lr": 0.5}, [])))
    assert main(["checkpoint", "diff", str(run), str(other)]) == DONE
    out = capsys.readouterr().out
    assert "config: optimizer.lr: 0.00015, 0.5" in out
    assert "2 tensors are equal, 0 differ" in out


def test_rm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "rm", str(run), "4", "5"]) == BAD_INPUT
    assert "has no step_00000005" in capsys.readouterr().err
    assert main(["checkpoint", "rm", str(run), "4"]) == DONE
    (step(run, 2) / "manifest.json").unlink()
    assert main(["checkpoint", "rm", str(run), "6"]) == BAD_INPUT
    assert "no whole checkpoint would be left" in capsys.readouterr().err
    assert main(["checkpoint", "rm", str(run), "6", "--force"]) == DONE
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]


def of_deepspeed(folder: Path, stage_3: bool) -> dict[str, torch.Tensor]:
    """What two ranks save of two weights, in the layout of save_checkpoint; the weights."""
    first, second = torch.arange(6.0).view(2, 3), torch.arange(100.0, 105.0)
    shapes = [{"first": first.shape, "second": second.shape}]
    folder.mkdir(parents=True)
    if stage_3:
        parts = [[torch.cat([first.flatten()[rank * 3 :][:3], second[rank * 3 :][:3]])] for rank in (0, 1)]
        parts[1][0] = torch.cat([parts[1][0], torch.zeros(1)])
        models = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]
    else:
        whole = torch.cat([first.flatten(), second, torch.zeros(1)])
        parts, models = [[whole[:6].clone()], [whole[6:].clone()]], ["mp_rank_00_model_states.pt"]
    for name in models:
        torch.save({"module": {"table": torch.ones(2)}, "param_shapes": shapes}, folder / name)
    key = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
    for rank, flats in enumerate(parts):
        state = {"optimizer_state_dict": {key: flats, "partition_count": 2}}
        torch.save(state, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return {"first": first, "second": second, "table": torch.ones(2)}


@pytest.mark.parametrize("stage_3", [False, True])
def test_import_of_deepspeeds_own(tmp_path: Path, stage_3: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Against its real writer: tests/integration/test_deepspeed.py."""
    expected = of_deepspeed(tmp_path / "saved" / "global_step7", stage_3)
    (tmp_path / "saved" / "latest").write_text("global_step7")
    argv = ["checkpoint", "import-deepspeed", str(tmp_path / "saved"), "--out", str(tmp_path / "out")]
    assert main(argv) == DONE
    assert "3 tensors, 13 numbers" in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert main(argv) == BAD_INPUT
    assert "is there and not empty" in capsys.readouterr().err


def test_what_is_missing_of_deepspeeds_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "saved" / "step"
    of_deepspeed(folder, False)
    argv = ["checkpoint", "import-deepspeed", str(tmp_path / "saved"), "--out", str(tmp_path / "out")]

    def refused() -> str:
        assert main(argv) == BAD_INPUT
        return capsys.readouterr().err

    (tmp_path / "saved" / "latest").write_text("other")
    assert "names 'other', which is not there; name one of step itself" in refused()
    (tmp_path / "saved" / "latest").write_text("step")
    second = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(second)
    second.unlink()
    assert "2 ranks saved it, and 1 *_optim_states.pt are there" in refused()
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(2)
    torch.save(content, second)
    assert "its files hold less than mp_rank_00_model_states.pt says" in refused()
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    assert "mp_rank_00_model_states.pt" in refused()
    assert not (tmp_path / "out").exists()
