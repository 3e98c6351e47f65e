"""The loader with its real reader process: what comes out, and what happens when something is bad."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.makers import encoded, photo, pixels, png_header, write_shards, write_tar
from vitscale import rng
from vitscale.config.schema import Data
from vitscale.data.batch import Batch
from vitscale.data.crop import CenterCrop, RandomCrop
from vitscale.data.index import ShardIndex, build_index
from vitscale.data.labels import LabelReader
from vitscale.data.loader import _REMEMBERED, Loader
from vitscale.data.order import SUBSTITUTES, Order, SequentialOrder
from vitscale.errors import DataError, InfrastructureError, StorageError
from vitscale.world import World

SETTINGS = Data(lanes=4, window=40, threads=2, prefetch=3, decode="simplejpeg")
CROP = RandomCrop((0.2, 1.0), (0.75, 4 / 3))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("shards"), [17, 9, 30, 14])


def loader(index: ShardIndex, rank: int = 0, ranks: int = 1, batch: int = 16, micro: int = 4, **options: Any) -> Loader:
    data = options.pop("data", SETTINGS)
    order = options.pop("order", None) or Order(index.samples, 7, batch, data.lanes, data.window)
    options = {"crop": CROP, "num_channels": 3, "seed": 7, "start": 0} | options
    world = World(rank=rank, world_size=ranks)
    return Loader(index=index, order=order, data=data, world=world, global_batch=batch, micro_batch=micro, **options)


def kept(batches: Loader) -> Batch:
    """The next batch, its pixels copied and their memory given back."""
    batch = next(batches)
    copied = replace(batch, pixels=batch.pixels.copy())
    batches.release(batch)
    return copied


def take(count: int, index: ShardIndex, **options: Any) -> list[Batch]:
    with loader(index, **options) as batches:
        return [kept(batches) for _ in range(count)]


def rows(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """A row a sample: all that the model will see of it."""
    return [
        (batch.names[i], int(batch.epochs[i]), int(batch.sample_ids[i]), int(batch.sample_keys[i]),
         int(batch.labels[i]), batch.boxes[i].tolist(), batch.image(i).shape, batch.image(i).tobytes())
        for batch in batches for i in range(len(batch))
    ]  # fmt: skip


def test_batches_hold_the_drawn_crops(index: ShardIndex) -> None:
    (batch,) = take(1, index, batch=64, micro=64)
    assert len(batch) == 64
    for i, (name, key) in enumerate(zip(batch.names, batch.sample_keys, strict=True)):
        number = int(name.split("/")[1])
        image = np.asarray(Image.open(io.BytesIO(photo(number, 16 + number % 7, 18 + number % 5))))
        ((top, left, bottom, right),) = CROP.boxes(np.array([key]), np.array([len(image)]), np.array([image.shape[1]]))
        assert np.array_equal(batch.image(i), image[top:bottom, left:right])
        assert batch.boxes[i].tolist() == [0, 0, bottom - top, right - left]
        assert batch.labels[i] == number % 10
        assert name.split("/")[0] == index.names[int(batch.sample_ids[i]) >> 32]
    assert np.array_equal(batch.sample_keys, rng.sample_key(7, 0, batch.sample_ids))
    assert (batch.pixels.dtype, batch.boxes.dtype, batch.heights.dtype) == (np.uint8, np.float32, np.int32)
    assert batch.replaced == ()


def test_ranks_see_together_what_one_rank_sees(index: ShardIndex) -> None:
    """8 global batches, over an epoch's border: slot order, whatever the ranks and the micro-batch."""
    one = rows(take(8, index, micro=16))
    assert [row[1] for row in one[::16]] == [0, 0, 0, 0, 1, 1, 1, 1]
    for ranks, micro in ((2, 4), (4, 4)):
        parts = 16 // ranks // micro
        each = [take(8 * parts, index, rank=rank, ranks=ranks, micro=micro) for rank in range(ranks)]
        slots = [batch for step in range(8) for rank in each for batch in rank[step * parts : (step + 1) * parts]]
        assert rows(slots) == one


def test_a_start_in_the_middle_goes_on_as_if_never_stopped(index: ShardIndex) -> None:
    whole = take(8, index, micro=16)
    for step in (1, 3, 5):
        assert rows(take(8 - step, index, micro=16, start=step * 16)) == rows(whole[step:])


def test_many_open_files_are_in_nobodys_way(index: ShardIndex) -> None:
    """A rank among hundreds has more than 1,024: select() of the system takes no higher number."""
    expected = rows(take(2, index))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert rows(take(2, index)) == expected
    finally:
        for number in opened:
            os.close(number)


def test_what_the_reader_reports_may_name_any_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    folder.mkdir()
    index = write_shards(folder, [20])
    (folder / "index.tables" / "s000.tar.cls.table").write_bytes(b"")
    assert len(take(1, index, micro=16)[0]) == 16
    assert "udcff/index.tables/s000.tar.cls.table: is no table" in capfd.readouterr().err


@pytest.mark.parametrize("out", [1, 2, 3])
def test_pixels_stay_until_they_are_released(index: ShardIndex, out: int) -> None:
    """With as many batches out as there are memories, too."""
    expected = rows(take(9, index, micro=8))
    with loader(index, micro=8) as batches:
        assert batches.memories == 3
        lent: deque[tuple[int, Batch]] = deque()
        for number in range(9):
            lent.append((number, next(batches)))
            time.sleep(0.01)  # the reader is filling the others meanwhile
            if len(lent) == out:
                number, batch = lent.popleft()
                assert rows([batch]) == expected[number * 8 : number * 8 + 8]
                batches.release(batch)


def test_more_than_there_are_memories_is_our_bug(index: ShardIndex) -> None:
    with loader(index, micro=8) as batches:
        first, *_ = (next(batches) for _ in range(3))
        with pytest.raises(AssertionError, match="never released"):
            next(batches)
        batches.release(first)
        with pytest.raises(AssertionError, match="not out"):
            batches.release(first)
        next(batches)


def ready(batches: Loader) -> bool:
    """Within 10 s."""
    deadline = time.monotonic() + 10
    while not batches.ready() and time.monotonic() < deadline:
        time.sleep(0.01)
    return batches.ready()


def test_ready_tells_whether_next_would_wait(index: ShardIndex) -> None:
    order = SequentialOrder(index.samples, 16)
    with loader(index, order=order, crop=CenterCrop(1.0), micro=16) as batches:
        assert not batches.ready(), "the reader has only begun"
        lent = []
        for _ in range(3):
            assert ready(batches)
            lent.append(next(batches))
        assert not batches.ready(), "there is no memory to put one into"
        batches.release(lent[0])
        assert ready(batches)
        assert batches.ready()
        batches.release(lent[1])
        batches.release(lent[2])
        assert [len(kept(batches)) for _ in range(2)] == [16, 16]
        assert batches.ready(), "for the end nobody has to wait"
        assert list(batches) == []


def test_an_error_is_ready_too(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.data.loader._MOST_RESTARTS", 0)
    with loader(index, micro=16) as batches:
        os.kill(reader_of(batches), signal.SIGKILL)
        with pytest.raises(InfrastructureError, match="signal 9"):
            ready(batches) and deque(kept(batches) for _ in range(4))


def test_memory_is_all_that_a_batch_lies_in(index: ShardIndex) -> None:
    with loader(index, micro=8) as batches:
        for number in range(5):
            batch = next(batches)
            which, memory = batches.memory(batch)
            assert which == number % 3
            assert memory.ctypes.data == batch.pixels.ctypes.data
            assert memory.nbytes >= batch.pixels.nbytes
            assert memory.nbytes % (2 << 20) == 0
            assert batches.memory(batch)[1] is memory
            batches.release(batch)


def test_images_may_grow_from_batch_to_batch(tmp_path: Path) -> None:
    """The shared memory grows when a batch needs more."""
    sizes = [10, 20, 900, 30, 1500, 40, 1000, 10]
    members = [(f"{i}.jpg", encoded(np.full((size, size, 3), i * 20, np.uint8))) for i, size in enumerate(sizes)]
    index = build_index([str(write_tar(tmp_path / "a.tar", members))])
    order = SequentialOrder(index.samples, 1)
    batches = take(8, index, order=order, batch=1, micro=1, crop=CenterCrop(1.0), data=replace(SETTINGS, prefetch=2))
    assert [batch.image(0).shape[0] for batch in batches] == sizes
    assert [int(batch.image(0).mean()) // 20 for batch in batches] == list(range(8))


def test_memory_that_is_no_longer_needed_is_given_back(tmp_path: Path) -> None:
    """After so many batches as are remembered; then it grows again."""
    sizes = [1500, *[40] * (_REMEMBERED + 9), 1500, 40]
    files = {size: encoded(np.full((size, size, 3), size % 256, np.uint8)) for size in set(sizes)}
    members = [(f"{i:03d}.jpg", files[size]) for i, size in enumerate(sizes)]
    index = build_index([str(write_tar(tmp_path / "a.tar", members))])
    with loader(index, order=SequentialOrder(index.samples, 1), batch=1, micro=1, crop=CenterCrop(1.0)) as batches:
        held = []
        for size, batch in zip(sizes, batches, strict=True):
            assert (batch.image(0) == size % 256).all()
            batches.release(batch)
            del batch
            held.append(sum(os.fstat(memory.descriptor).st_size for memory in batches._memories))
    assert held[0] == held[_REMEMBERED - 2] > 7_000_000
    assert held[_REMEMBERED + 3] < 7_000_000, "shrunk, once all that is remembered is small"
    assert held[-1] > 7_000_000


def test_sequential_order_ends(index: ShardIndex) -> None:
    order = SequentialOrder(index.samples, 16)
    with loader(index, order=order, crop=CenterCrop(0.875), micro=4, ranks=2, rank=1) as batches:
        names, repeats = [], []
        for batch in batches:
            names += batch.names
            repeats += batch.repeats.tolist()
            batches.release(batch)
    positions = [step * 16 + 8 + i for step in range(5) for i in range(8)]
    assert [int(name.split("/")[1]) for name in names] == [p % 70 for p in positions]
    assert repeats == [p // 70 for p in positions]  # what fills up the last batch is not counted again


def test_what_a_rank_draws_does_not_depend_on_threads(index: ShardIndex) -> None:
    expected = rows(take(6, index, micro=16))
    for threads, prefetch in ((1, 2), (5, 8)):
        assert rows(take(6, index, micro=16, data=replace(SETTINGS, threads=threads, prefetch=prefetch))) == expected


@pytest.mark.parametrize("name", ["auto", "nvimgcodec", "pillow"])
def test_full_scale_decoders_agree(index: ShardIndex, name: str) -> None:
    with loader(index, micro=16, data=replace(SETTINGS, decode=name)) as batches:
        assert rows([kept(batches) for _ in range(2)]) == rows(take(2, index, micro=16))
        assert batches.decoder == {"auto": "nvimgcodec"}.get(name, name)


# --- bad samples ---


def shard_with(folder: Path, bad: dict[int, list[tuple[str, bytes]]], count: int = 32) -> ShardIndex:
    """One shard of `count` labelled photographs; of some samples the members are others."""
    members: list[tuple[str, bytes]] = []
    for i in range(count):
        good = [("jpg", photo(i)), ("cls", b"3")]
        members += [(f"{i:04d}.{kind}", data) for kind, data in bad.get(i, good)]
    return build_index([str(write_tar(folder / "a.tar", members))])


def bad_samples() -> dict[int, list[tuple[str, bytes]]]:
    label = ("cls", b"3")
    return {
        2: [("jpg", b"this is a text"), label],
        5: [("jpg", photo(5)[:-40]), label],
        6: [("jpg", b""), label],
        9: [("png", png_header(50_000, 50_000)), label],
        12: [("json", b"{}"), label],
        17: [("jpg", photo(17)), ("cls", b"cat")],
        18: [("jpg", photo(18))],
        21: [("jpg", photo(21)), ("cls", b"1000")],
        30: [("tif", encoded(Image.new("F", (8, 8)), "TIFF")), label],
    }


CAUSES = {2: "undecodable", 5: "undecodable", 6: "undecodable", 9: "too_large", 12: "no_image", 17: "label",
          18: "label", 21: "label", 30: "undecodable"}  # fmt: skip


def test_bad_samples_are_replaced_and_told(tmp_path: Path) -> None:
    bad = bad_samples()
    settings = replace(SETTINGS, lanes=2, window=16)
    clean_index, index = (shard_with(tmp_path / name, what) for name, what in _folders(tmp_path, bad).items())
    options: dict[str, Any] = {
        "batch": 8,
        "micro": 8,
        "data": settings,
        "labels": LabelReader(required=True, num_labels=10),
    }
    clean, batches = take(4, clean_index, **options), take(4, index, **options)
    told = {}
    for step, (was, batch) in enumerate(zip(clean, batches, strict=True)):
        slots = {item.slot for item in batch.replaced}
        for slot in range(8):
            if slot not in slots:
                assert rows([batch])[slot] == rows([was])[slot], "no other slot moves"
        for item in batch.replaced:
            told[int(item.key)] = item.cause
            assert was.names[item.slot] == f"{item.shard}/{item.key}"
            assert item.reason
            stand_in = int(batch.names[item.slot].split("/")[1])
            assert stand_in not in bad
            order = Order(index.samples, 7, 8, 2, 16)
            others = [int(i) & 0xFFFFFFFF for i in order.candidates(step, item.slot).ids]
            assert stand_in == next(i for i in others if i not in bad), "the next readable one of its block"
            assert batch.labels[item.slot] == 3
            assert np.array_equal(batch.sample_keys, rng.sample_key(7, 0, batch.sample_ids))
    assert told == CAUSES
    for ranks in (2, 4):
        each = [take(4, index, rank=rank, ranks=ranks, **(options | {"micro": 8 // ranks})) for rank in range(ranks)]
        slots = [rank[step] for step in range(4) for rank in each]
        assert rows(slots) == rows(batches)
        assert [item for batch in slots for item in batch.replaced] == [i for b in batches for i in b.replaced]


def _folders(tmp_path: Path, bad: dict[int, Any]) -> dict[str, dict[int, Any]]:
    for name in ("clean", "bad"):
        (tmp_path / name).mkdir()
    return {"clean": {}, "bad": bad}


def test_labels_may_be_missing_where_none_is_needed(tmp_path: Path) -> None:
    what = {i: members for i, members in bad_samples().items() if CAUSES[i] == "label"}
    (batch,) = take(1, shard_with(tmp_path, what), batch=28, micro=28)
    assert batch.replaced == ()
    odd = {17: -1, 18: -1, 21: 1000}
    numbers = [int(name.split("/")[1]) for name in batch.names]
    assert batch.labels.tolist() == [odd.get(number, 3) for number in numbers]


def test_no_label_at_all_is_told_at_the_start(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [30], labels=False)
    with pytest.raises(DataError, match=r"data\.label"):
        loader(index, labels=LabelReader(required=True))
    with (
        loader(index, rank=1, ranks=2, labels=LabelReader(required=True)) as batches,
        pytest.raises(DataError, match="no member with one"),
    ):
        next(batches)  # told by rank 0 before; another rank does not look


def test_nothing_but_bad_samples_is_an_error(tmp_path: Path) -> None:
    index = shard_with(tmp_path, {i: [("jpg", b"x"), ("cls", b"1")] for i in range(100)}, count=100)
    with loader(index) as batches, pytest.raises(DataError) as caught:
        next(batches)
    assert f"nor is any of the {min(SUBSTITUTES, 24)} samples" in str(caught.value)
    assert "a/00" in str(caught.value)


def test_bad_channels(tmp_path: Path) -> None:
    rgba = np.concatenate([pixels(1), pixels(2, channels=1)], axis=2)
    index = shard_with(tmp_path, {i: [("png", encoded(Image.fromarray(rgba), "PNG"))] for i in range(0, 32, 2)})
    batches = take(3, index, num_channels=4, batch=8)
    assert all(batch.image(i).shape[2] == batch.channels == 4 for batch in batches for i in range(len(batch)))
    assert {item.cause for batch in batches for item in batch.replaced} == {"channels"}


# --- shards that are not what the index says ---


def changed(index: ShardIndex, shard: int, change: Callable[[bytes], bytes], same_size: bool) -> str:
    path = Path(index.paths[shard])
    data = path.read_bytes()
    new = change(data)
    path.write_bytes(new.ljust(len(data), b"\0") if same_size else new)
    return str(path)


@pytest.mark.parametrize(
    "change, same_size, word",
    [
        (lambda data: data[: len(data) // 2], False, "bytes, the index says"),
        (lambda data: data[: len(data) // 2], True, ""),
        (lambda data: data[: data.index(b"000003.jpg")], True, "holds 3 samples, the index says 12"),
        (lambda data: data[: data.index(b"000003.jpg") + 1] + b"\xff" + data[data.index(b"000003.jpg") + 2 :], True,
         "checksum"),
    ],
)  # fmt: skip
def test_a_shard_that_changed_ends_the_run(tmp_path: Path, change: Any, same_size: bool, word: str) -> None:
    index = write_shards(tmp_path, [12, 12])
    path = changed(index, 0, change, same_size)
    with pytest.raises(DataError) as caught:
        take(8, index)
    assert path in str(caught.value)
    assert word in str(caught.value)


def test_a_missing_shard_is_told_after_the_good_batches_before_it(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [8, 8, 8])
    Path(index.paths[2]).unlink()
    with loader(index, order=SequentialOrder(index.samples, 4), batch=4) as batches:
        assert [len(kept(batches)) for _ in range(4)] == [4] * 4
        for _ in range(2):
            with pytest.raises(DataError, match=r"s002.tar.*No such file"):
                next(batches)


# --- the reader's life ---


def reader_of(batches: Loader) -> int:
    return batches._process.pid


def test_the_reader_is_of_this_package_wherever_it_is_started(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vitscale", "numpy", "select"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    assert len(take(1, index, micro=16)[0]) == 16


def test_a_killed_reader_is_started_again_at_its_place(index: ShardIndex, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever of it lay in the memories, was on its way or lent."""
    expected = rows(take(12, index, micro=16))
    with loader(index, micro=16) as batches:
        got = []
        for number in range(12):
            if number % 2 == 0:  # before the first batch too, and with others already received
                os.kill(reader_of(batches), signal.SIGKILL)
            if number == 5:
                ready(batches)
            batch = next(batches)
            if number == 6:
                os.kill(reader_of(batches), signal.SIGKILL)
            got += rows([batch])
            batches.release(batch)
    assert got == expected
    assert "rank 0: the reader process died (signal 9) and is started again" in capfd.readouterr().err


def test_a_reader_that_dies_again_and_again_is_told_with_its_place(index: ShardIndex) -> None:
    with loader(index, micro=16) as batches:
        for _ in range(2):
            kept(batches)
        start = batches._start_reader

        def doomed() -> None:
            start()
            os.kill(reader_of(batches), signal.SIGKILL)

        batches._start_reader = doomed  # type: ignore[method-assign]
        os.kill(reader_of(batches), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(
            InfrastructureError, match=r"died \(signal 9\) at sample \d+ of the order.*4 times"
        ) as caught:
            deque(kept(batches) for _ in range(9))
        assert time.monotonic() - started < 10
    assert any(name in str(caught.value) for name in index.names)


def test_a_reader_that_hangs_says_where_it_stands(index: ShardIndex, capfd: pytest.CaptureFixture[str]) -> None:
    with loader(index, micro=16, data=replace(SETTINGS, patience_s=1.0)) as batches:
        kept(batches)
        os.kill(reader_of(batches), signal.SIGSTOP)
        with pytest.raises(StorageError, match=r"read nothing for data.patience_s=1, at sample \d+ of the order"):
            deque(kept(batches) for _ in range(9))
    assert 'File "' in capfd.readouterr().err, "the stacks of its threads"


def test_a_reader_that_no_kill_ends_is_left_behind(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one in state D, in which the kernel holds a signal back: here it is the kill that does not reach it."""
    monkeypatch.setattr("vitscale.data.loader._LEAVING_S", 0.3)
    batches = loader(index, micro=16)
    kept(batches)
    process = batches._process
    os.kill(process.pid, signal.SIGSTOP)
    kill, process.kill = process.kill, lambda: None  # type: ignore[method-assign]
    try:
        started = time.monotonic()
        batches.close()
        assert time.monotonic() - started < 5
        assert f"the reader process {process.pid} was killed and waits" in capfd.readouterr().err
    finally:
        kill()
        process.wait()


def test_the_reader_ignores_what_stops_a_run(index: ShardIndex) -> None:
    expected = rows(take(6, index, micro=16))
    with loader(index, micro=16) as batches:
        for number in range(6):  # from the first moment of its life on
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(reader_of(batches), signum)
            assert rows([kept(batches)]) == expected[number * 16 : number * 16 + 16]


def test_close_ends_the_reader_and_keeps_the_batch(index: ShardIndex) -> None:
    files = len(os.listdir("/proc/self/fd"))
    batches = loader(index, micro=16)
    batch = next(batches)
    before = rows([batch])
    batches.close()
    batches.close()
    assert batches._process.returncode == 0
    assert rows([batch]) == before
    del batch, batches  # a mapping of the shared memory keeps its file
    assert len(os.listdir("/proc/self/fd")) == files


PARENT = """
import sys, time
from tests.data.test_loader import loader, reader_of
from vitscale.data.labels import LabelReader
from vitscale.data.index import ShardIndex
from pathlib import Path
batches = loader(ShardIndex.load(Path(sys.argv[1])))
next(batches)
print(reader_of(batches), flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_the_reader_leaves_when_its_parent_is_killed(index: ShardIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index.json")
    command = [sys.executable, "-c", PARENT, str(tmp_path / "index.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


def test_the_reader_never_imports_torch(index: ShardIndex) -> None:
    with loader(index, data=replace(SETTINGS, decode="auto")) as batches:
        next(batches)
        mapped = Path(f"/proc/{reader_of(batches)}/maps").read_text()
    assert "nvimgcodec" in mapped
    assert "libtorch" not in mapped


@pytest.mark.parametrize(("room", "some"), [("data", {"reader", "loader"}), ("prepare", {"pack", "digits"})])
def test_the_room_never_imports_torch(room: str, some: set[str]) -> None:
    program = (
        f"import sys, json, importlib, pkgutil, vitscale.{room} as room\n"
        "names = [m.name for m in pkgutil.iter_modules(room.__path__)]\n"
        f"[importlib.import_module(f'vitscale.{room}.{{name}}') for name in names]\n"
        "print(json.dumps([names, 'torch' in sys.modules, 'webdataset' in sys.modules]))\n"
    )
    names, has_torch, has_webdataset = json.loads(subprocess.check_output([sys.executable, "-c", program]))
    assert some <= set(names)
    assert not has_torch
    assert not has_webdataset


# --- other tools' shards ---


def test_webdatasets_writer_and_img2datasets_layout_are_read(tmp_path: Path) -> None:
    import webdataset

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for i in range(12):
                key = f"{shard:05d}{i:04d}"
                meta = {"key": key, "status": "success", "width": 32}
                image = photo(shard * 12 + i)
                writer.write({"__key__": key, "jpg": image, "json": meta, "txt": f"caption {i}", "cls": i})
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 14, "successes": 12}))
    from vitscale.config.schema import Source
    from vitscale.data.index import open_index

    index = open_index((Source(f"{tmp_path}/{{00000..00001}}.tar"),), None, tmp_path / "run")
    assert index.samples.tolist() == [12, 12]
    (batch,) = take(1, index, order=SequentialOrder(index.samples, 24), crop=CenterCrop(1.0), batch=24, micro=24)
    assert batch.labels.tolist() == list(range(12)) * 2
    assert batch.names[13] == "00001/000010001"
    square = Image.open(io.BytesIO(photo(13)))
    side = min(square.size)
    left = (square.width - side) // 2
    assert np.array_equal(batch.image(13), np.asarray(ImageOps.exif_transpose(square))[:, left : left + side])
