"""The verbs `vitscale checkpoint`."""

from __future__ import annotations

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.manifest import as_text
from vitscale.checkpoint.retention import Retention, remove, retire
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import SoleRank, folder_name, open_checkpoint
from vitscale.cli import main
from vitscale.config.load import config_of, dump_config
from vitscale.errors import CheckpointError
from vitscale.interop.deepspeed_folder import read_deepspeed
from vitscale.run.checkpoints import as_table, verify
from vitscale.run.export import export_run
from vitscale.run.start import require_resumable
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
        require_resumable(SimpleNamespace(), open_checkpoint(step(run, 6), SoleRank()))


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


def test_rm_of_what_a_run_goes_back_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "rm", str(run), "4", "2"]) == BAD_INPUT
    assert "goes back to step 2 (the best); --force deletes it anyway" in capsys.readouterr().err
    assert step(run, 4).exists()
    assert main(["checkpoint", "rm", str(run), "2", "--force"]) == DONE


def test_rm_after_one_that_was_broken_off(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that is named twice, what a crash left, and a link, whose target stays."""
    (run / "checkpoints" / f".tmp-{folder_name(4)}" / "left").mkdir(parents=True)
    elsewhere = step(run, 6).rename(tmp_path / "elsewhere")
    step(run, 6).symlink_to(elsewhere)
    assert main(["checkpoint", "rm", str(run), "4", "6", "4"]) == DONE
    assert capsys.readouterr().out.count("deleted") == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == [folder_name(2)]
    assert open_checkpoint(elsewhere, SoleRank()).step == 6


def test_a_link_is_retired(run: Path, tmp_path: Path) -> None:
    elsewhere = step(run, 2).rename(tmp_path / "elsewhere")
    step(run, 2).symlink_to(elsewhere)
    retire(run / "checkpoints", 6, Retention(1), {}, pytest.fail)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [folder_name(6)]
    assert (elsewhere / "manifest.json").exists()


def test_ls_beside_a_run_that_trains(run: Path) -> None:
    root = run / "checkpoints"

    def train() -> None:
        for number in range(10, 70):
            shutil.copytree(step(run, 6), root / ".tmp-new")
            (root / ".tmp-new").rename(step(run, number))
            if number > 10:
                remove(step(run, number - 1))

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        while not training.done():
            assert as_table(run).startswith("step")
            assert all(folder in (step(run, 2), step(run, 4), step(run, 6)) or faults for folder, faults in verify(run))
        training.result()


def test_verify_beside_a_run_that_trains(run: Path) -> None:
    looked_at = verify(run)
    assert next(looked_at) == (step(run, 6), [])
    remove(step(run, 4))
    assert list(looked_at) == [(step(run, 2), [])]


def test_what_is_not_whole_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (step(run, 6) / "manifest.json").unlink()
    (step(run, 4) / "link").symlink_to("nowhere")
    for verb in ("verify", "diff"):
        assert main(["checkpoint", verb, str(step(run, 6)), *([str(run)] if verb == "diff" else [])]) == BAD_INPUT
        assert "manifest.json is missing" in "".join(capsys.readouterr())
    assert main(["checkpoint", "ls", str(run)]) == DONE


def test_what_a_manifest_says_does_not_move_the_cursor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = step(run, 6) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"]["world_size"] = "\x1b[2J"
    manifest["tensors"][0]["name"] = "\x1b[31m"
    path.write_text(as_text(manifest))
    assert main(["checkpoint", "ls", str(run)]) == DONE
    assert main(["checkpoint", "verify", str(run)]) == BAD_INPUT
    assert main(["checkpoint", "diff", str(step(run, 4)), str(step(run, 2))]) == DONE
    assert "\x1b" not in "".join(capsys.readouterr())


def test_export_without_the_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest is taken, which in these tests holds no model."""
    shutil.rmtree(step(run, 2))
    with pytest.raises(CheckpointError, match=r"unexpected: head\.weight"):
        export_run(run)
    assert "step_00000002, the best one, is not there; the newest is exported" in capsys.readouterr().err


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
    assert "hold less than its model states say: 8 numbers, and 11 are needed" in refused()
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(11)
    torch.save(content, second)
    assert "hold more than its model states say: 17 numbers, and 11 are needed" in refused()
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    assert "mp_rank_00_model_states.pt" in refused()
    assert not (tmp_path / "out").exists()


def test_gaps_that_deepspeed_leaves_behind_parameters(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    folder.mkdir()
    torch.save({"module": {}, "param_shapes": [{"a": torch.Size([2]), "b": torch.Size([3])}]},
               folder / "mp_rank_00_model_states.pt")  # fmt: skip
    state = {"single_partition_of_fp32_groups": [torch.arange(8.0)], "partition_count": [1],
             "param_alignment_paddings": [[2, 1]]}  # fmt: skip
    torch.save({"optimizer_state_dict": state}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    found = read_deepspeed(folder)
    assert found["a"].tolist() == [0, 1]
    assert found["b"].tolist() == [4, 5, 6]


def test_frozen_weights_of_a_rank_that_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    of_deepspeed(folder, True)
    models = sorted(folder.glob("*_model_states.pt"))
    for rank, path in enumerate(models):
        content = torch.load(path)
        content |= {"frozen_param_shapes": {"frozen": torch.Size([3])},
                    "frozen_param_fragments": {"frozen": torch.tensor([2.0 * rank, 2.0 * rank + 1])}}  # fmt: skip
        torch.save(content, path)
    assert read_deepspeed(folder)["frozen"].tolist() == [0, 1, 2]
    models[1].unlink()
    with pytest.raises(CheckpointError, match=r"2 ranks saved it, and 1 \*_model_states.pt are there \(of ranks 0\)"):
        read_deepspeed(folder)


@pytest.mark.parametrize("stage_3", [False, True])
def test_any_other_kind_of_value_in_deepspeeds_own(tmp_path: Path, stage_3: bool) -> None:
    """A CheckpointError, or the value is of no account."""
    folder = tmp_path / "step"
    of_deepspeed(folder, stage_3)
    strange = [None, 1, -1, "text", b"bytes", [], [1], {}, {1: 2}, {"a": "b"}, [[1]], [{}], [{"first": 3}],
               [{"first": [-1]}], [None], torch.ones(2, 2), [torch.ones(2, 2)], [torch.ones(3, dtype=torch.int64)],
               {"first": torch.ones(3)}, float("nan"), True, 10**30, [10**30], [{"first": [2**40, 2**40]}]]  # fmt: skip
    for path in (next(folder.glob("*_model_states.pt")), next(folder.glob("*_optim_states.pt"))):
        written = path.read_bytes()
        content = torch.load(path)
        inner = content.get("optimizer_state_dict", {})
        keys = [(content, key) for key in (*content, "shared_params", "frozen_param_shapes", "frozen_param_fragments")]
        for holder, key in [*keys, *((inner, key) for key in (*inner, "param_alignment_paddings") if inner)]:
            before = dict(holder)
            for value in strange:
                holder[key] = value
                torch.save(content, path)
                with contextlib.suppress(CheckpointError):
                    assert isinstance(read_deepspeed(folder), dict), (key, value)
                holder.clear()
                holder.update(before)
        path.write_bytes(written)
    for value in (1, [1], "text"):
        torch.save(value, path)
        with pytest.raises(CheckpointError):
            read_deepspeed(folder)


def test_an_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_deepspeed(tmp_path / "step", False)
    (tmp_path / "file").touch()
    argv = ["checkpoint", "import-deepspeed", str(tmp_path / "step"), "--out", str(tmp_path / "file")]
    assert main(argv) == BAD_INPUT
    assert "is there and no folder; name a new folder" in capsys.readouterr().err
