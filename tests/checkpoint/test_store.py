from __future__ import annotations

import json
import random
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from tests.checkpoint.ranks import run_ranks
from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.manifest import as_text
from vitscale.checkpoint.saving import save_checkpoint
from vitscale.checkpoint.store import SoleRank, checkpoint_folders, open_checkpoint, open_newest
from vitscale.errors import CheckpointError, StorageError

SHAPES = {"encoder.weight": (7, 11), "encoder.bias": (7,), "scale": (), "none": (0, 3)}


def tensors(step: int) -> dict[tuple[str, str], np.ndarray]:
    """A small training state whose values tell the step."""
    draw = np.random.default_rng(step)
    state = {
        (kind, name): draw.standard_normal(shape).astype(np.float32)
        for kind in ("param", "exp_avg")
        for name, shape in SHAPES.items()
    }
    return state | {("buffer", "positions"): np.arange(5) + step}


def share(step: int, rank: int, world: int) -> list[Piece]:
    """What one rank holds: a run of every tensor, and the buffer whole on rank 0."""
    pieces = []
    for (kind, name), array in tensors(step).items():
        first, last = (array.size * r // world for r in (rank, rank + 1))
        if kind == "buffer":
            first, last = 0, array.size if rank == 0 else 0
        pieces.append(Piece(kind, name, array.shape, first, array.reshape(-1)[first:last]))
    return pieces


def save(root, step, keep=3, report=None, ranks=None):
    ranks = ranks or SoleRank()
    pieces = share(step, ranks.rank, ranks.world_size)
    return save_checkpoint(
        root,
        step,
        pieces,
        {"samples": step * 256, "loss": 0.1 + step},
        ranks,
        keep,
        **({"report": report} if report else {}),
    )


def assert_holds(checkpoint, step):
    assert checkpoint.step == step
    assert checkpoint.state == {"samples": step * 256, "loss": 0.1 + step}
    expected = tensors(step)
    assert checkpoint.tensors == {key: (array.shape, array.dtype) for key, array in expected.items()}
    for (kind, name), array in expected.items():
        np.testing.assert_array_equal(checkpoint.whole(kind, name), array, strict=True)


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 3), (3, 2), (4, 1)])
def test_saved_by_some_ranks_and_read_by_others(tmp_path, writers, readers):
    folders = run_ranks(writers, lambda ranks: save(tmp_path / "root", 12, ranks=ranks))
    assert folders == [tmp_path / "root" / "step_00000012"] * writers
    names = {"manifest.json", *(f"state-{rank:05d}.safetensors" for rank in range(writers))}
    assert {path.name for path in folders[0].iterdir()} == names

    def read(ranks):
        said = []
        checkpoint = open_newest(tmp_path / "root", ranks, said.append)
        assert_holds(checkpoint, 12)
        mine = checkpoint.read("param", "encoder.weight", 5 * ranks.rank, 9)
        np.testing.assert_array_equal(mine, tensors(12)["param", "encoder.weight"].reshape(-1)[5 * ranks.rank :][:9])
        return said

    assert run_ranks(readers, read) == [[]] * readers


def test_no_checkpoint_yet(tmp_path):
    assert open_newest(tmp_path / "not there", SoleRank(), pytest.fail) is None
    (tmp_path / ".tmp-step_00000003").mkdir()
    (tmp_path / "step_of_mine").mkdir()
    assert open_newest(tmp_path, SoleRank(), pytest.fail) is None


def test_retention_keeps_the_newest_and_sweeps_what_a_crash_left(tmp_path):
    (tmp_path / ".tmp-step_00000001").mkdir()
    (tmp_path / ".tmp-step_00000001" / "state-00000.safetensors").write_bytes(b"half")
    for step in (5, 10, 100_000_000, 100_000_005):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_100000000", "step_100000005"]
    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 100_000_005)


def test_what_cannot_be_removed_is_reported(tmp_path, at_point):
    def in_the_way():
        (tmp_path / ".tmp-step_00000001").write_bytes(b"a file, where a folder is to be")

    said: list[str] = []
    save(tmp_path, 1, keep=1)
    at_point("save.root_synced", in_the_way)
    save(tmp_path, 2, keep=1, report=said.append)
    assert "old checkpoint could not be removed" in said[0]
    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 2)


# ---- broken checkpoints


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def swap(folder):
    first, second = folder / "state-00000.safetensors", folder / "state-00001.safetensors"
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def other_format(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))


def other_samples(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 512', '"samples": 513'))


BREAKS = {
    "flipped bit": (lambda f: flip(f / "state-00001.safetensors", -3), "state-00001.safetensors has sha256 .* written"),
    "hole": (
        lambda f: (f / "state-00000.safetensors").write_bytes(bytes((f / "state-00000.safetensors").stat().st_size)),
        "state-00000.safetensors has sha256",
    ),
    "cut file": (lambda f: cut(f / "state-00001.safetensors", 100), "state-00001.safetensors has 100 bytes, [0-9]+"),
    "missing file": (lambda f: (f / "state-00000.safetensors").unlink(), "state-00000.safetensors is missing"),
    "swapped files": (swap, "state-0000[01].safetensors has"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda f: cut(f / "manifest.json", 200), "manifest.json is no whole manifest"),
    "empty manifest": (lambda f: cut(f / "manifest.json", 0), "manifest.json is no whole manifest"),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json is no whole manifest"),
    "a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is no whole manifest"),
    "brackets": (lambda f: (f / "manifest.json").write_text("[" * 99999), "manifest.json is no whole manifest"),
    "edited manifest": (other_samples, "manifest.json does not match its own sha256"),
    "other format": (other_format, "format 3, this vitscale reads up to 2"),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("readers", [1, 3])
def test_a_broken_newest_is_named_and_the_one_before_taken(tmp_path, name, readers):
    break_it, says = BREAKS[name]
    for step in (1, 2):
        run_ranks(2, lambda ranks, step=step: save(tmp_path, step, ranks=ranks))
    break_it(tmp_path / "step_00000002")

    def read(ranks):
        said = []
        assert_holds(open_newest(tmp_path, ranks, said.append), 1)
        return said

    said, *others = run_ranks(readers, read)
    assert len(said) == 1
    assert others == [[]] * (readers - 1)  # rank 0 speaks for all
    assert "step_00000002: is not usable" in said[0]
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / "step_00000002", SoleRank())

    # Going on from step 1 sets the broken one aside, whatever its number, and never deletes the good.
    run_ranks(2, lambda ranks: save(tmp_path, 1, keep=1, ranks=ranks, report=said.append))
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "bad-step_00000002"}
    assert "set aside as bad-step_00000002" in said[1]


def test_any_flipped_bit_is_found(tmp_path):
    folder = save(tmp_path, 3)
    draw = random.Random(0)
    for path in folder.iterdir():
        content = path.read_bytes()
        for _ in range(150):
            flip(path, draw.randrange(len(content)), draw.randrange(8))
            with pytest.raises(CheckpointError, match=path.name):
                open_checkpoint(folder, SoleRank())
            path.write_bytes(content)
    assert_holds(open_checkpoint(folder, SoleRank()), 3)


def test_when_all_are_broken_nothing_starts_over(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state-00000.safetensors").unlink()
    said = []
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be used"):
        open_newest(tmp_path, SoleRank(), said.append)
    assert len(said) == 2


def test_extra_files_are_reported_and_not_read(tmp_path):
    folder = save(tmp_path, 4)
    shutil.copy(folder / "state-00000.safetensors", folder / "state-00001.safetensors")
    said = []
    assert_holds(open_newest(tmp_path, SoleRank(), said.append), 4)
    assert len(said) == 1
    assert said[0].endswith("not used: state-00001.safetensors")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    folder = save(tmp_path, 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../state-00000.safetensors"
    (folder / "manifest.json").write_text(as_text(manifest))  # forged, with a right digest
    with pytest.raises(CheckpointError, match="is no name of a state file"):
        open_checkpoint(folder, SoleRank())


def test_the_same_step_again_replaces_a_broken_one(tmp_path):
    (save(tmp_path, 7) / "manifest.json").unlink()
    save(tmp_path, 7)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step_00000007"]
    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 7)
    assert not list(tmp_path.glob(".*"))


# ---- saves that fail


def test_a_write_that_fails_on_one_rank_fails_on_all(tmp_path, at_point):
    run_ranks(2, lambda ranks: save(tmp_path, 1, ranks=ranks))
    lock = threading.Lock()

    def in_the_way():
        with lock:
            (tmp_path / ".tmp-step_00000002" / "state-00001.safetensors").mkdir(exist_ok=True)

    at_point("save.state_begun", in_the_way)
    errors = run_ranks(2, lambda ranks: save(tmp_path, 2, ranks=ranks))
    for error in errors:
        assert isinstance(error, StorageError)
        assert "rank 1: " in str(error)
        assert "rank 0: " not in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 1)

    at_point("save.state_begun", lambda: None)  # the next save, with nothing in its way, succeeds
    run_ranks(2, lambda ranks: save(tmp_path, 3, ranks=ranks))
    assert_holds(open_newest(tmp_path, SoleRank(), pytest.fail), 3)


def test_a_file_that_rank_0_does_not_see(tmp_path, at_point):
    hidden = threading.Lock()

    def hide():
        with hidden:
            (tmp_path / ".tmp-step_00000001" / "state-00001.safetensors").unlink(missing_ok=True)

    at_point("save.agreed", hide)
    errors = run_ranks(2, lambda ranks: save(tmp_path, 1, ranks=ranks))
    assert all("a file system that all nodes share" in str(error) for error in errors)
    assert list(tmp_path.iterdir()) == []


def test_pieces_that_do_not_cover_are_told_on_every_rank(tmp_path):
    errors = run_ranks(2, lambda ranks: save_checkpoint(tmp_path, 1, share(1, 0, 2), {}, ranks, 1))
    assert all("AssertionError: pieces do not make up whole tensors" in str(error) for error in errors)
    assert all("encoder.weight" in str(error) for error in errors)
    assert list(tmp_path.iterdir()) == []


def test_no_room(tmp_path, monkeypatch):
    values = np.zeros(10**6, np.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(4.2e6)))  # not a tenth more
    with pytest.raises(StorageError, match=r"needs 0.004 GB and a tenth more, .* has 0.0042 GB .* checkpoint.keep"):
        save_checkpoint(tmp_path, 1, [Piece("param", "w", (10**6,), 0, values)], {}, SoleRank(), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_format_1_is_read(tmp_path):
    """As it was written before: a row (file, start, count) a piece."""
    folder = run_ranks(3, lambda ranks: save(tmp_path, 1, ranks=ranks))[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    for tensor in manifest["tensors"]:
        rows, start = [], 0
        for file, count, files in tensor["pieces"]:
            for number in range(files):
                rows.append([file + number, start, count])
                start += count
        tensor["pieces"] = rows
    (folder / "manifest.json").write_text(as_text(manifest | {"format": 1}))
    assert_holds(open_checkpoint(folder, SoleRank()), 1)


# ---- another model


def test_a_checkpoint_of_another_model_names_the_differing(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path, 1), SoleRank())
    checkpoint.require(SHAPES, "param")
    other = {name: shape for name, shape in SHAPES.items() if name != "scale"} | {"encoder.bias": (9,)}
    other |= {f"blocks.{number}": (1,) for number in range(9)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require(other, "param")
    message = str(caught.value)
    assert "9 missing: blocks.0, blocks.1, blocks.2, blocks.3, blocks.4, blocks.5 and 3 more" in message
    assert "1 not known here: scale" in message
    assert "1 of another shape: encoder.bias (saved [7], here [9])" in message
    with pytest.raises(CheckpointError, match="holds no ema named 'scale'"):
        checkpoint.whole("ema", "scale")


def test_state_is_read_back_as_it_was(tmp_path):
    state = {"bad": {10: 1, 9: 2}, "config": {"betas": (0.9, 0.95), "lr": 1.5e-4, "name": "é", "clip": None}}
    folder = save_checkpoint(tmp_path, 1, [], state, SoleRank(), 1)
    read = open_checkpoint(folder, SoleRank()).state
    assert read == {"bad": {"10": 1, "9": 2}, "config": state["config"] | {"betas": [0.9, 0.95]}}
    with pytest.raises(StorageError, match="not JSON compliant"):
        save_checkpoint(tmp_path, 2, [], {"loss": float("nan")}, SoleRank(), 1)
