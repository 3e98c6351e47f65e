"""Many shards over epochs and starts: no header is read twice, and none where a step waits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import photo, write_tar
from tests.data.stores import CountingFiles
from vitscale.config.schema import Source
from vitscale.data.assemble import Assembler, Plan
from vitscale.data.crop import RandomCrop
from vitscale.data.index import ShardIndex, open_index
from vitscale.data.labels import LabelReader
from vitscale.data.loader import fetched_ahead
from vitscale.data.order import Order
from vitscale.data.sidecar import FOLDER

SHARDS, SAMPLES = 200, 4  # samples a shard
BATCH, LANES, WINDOW = 16, 4, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, image = tmp_path_factory.mktemp("shards"), photo(3)
    for shard in range(SHARDS):
        numbers = [shard * SAMPLES + i for i in range(SAMPLES)]
        members = [(f"{number:04d}.{kind}", data) for number in numbers
                   for kind, data in (("jpg", image), ("cls", b"%d" % (number % 10)))]  # fmt: skip
        write_tar(path / f"s{shard:03d}.tar", members)
    return path


class Pixels:
    """A micro-batch's memory in this process."""

    def __init__(self) -> None:
        self.array = np.zeros(1 << 20, dtype=np.uint8)

    def reserve(self, count: int) -> np.ndarray:
        assert count <= len(self.array)
        return self.array


def assembler(
    index: ShardIndex, rank: int = 0, ranks: int = 1, lanes: int = LANES, window: int = WINDOW
) -> tuple[Assembler, Order]:
    order = Order(index.samples, 7, BATCH, lanes, window)
    ahead, table_samples = fetched_ahead(order, SAMPLES, BATCH, ranks)
    plan = Plan(
        index=index, order=order, crop=RandomCrop((0.2, 1.0), (0.75, 4 / 3)), decoder="simplejpeg", channels=3,
        background=255, max_pixels=10**6, image_size=None, image_bytes=None, extension="cls",
        labels=LabelReader(required=True, num_labels=10), seed=7,
        global_batch=BATCH, micro_batch=BATCH // ranks, rank=rank, ranks=ranks, first_batch=0, threads=2, prefetch=2,
        table_samples=table_samples, ahead=ahead,
    )  # fmt: skip
    return Assembler(plan), order


def run(folder: Path, batches: int, rank: int = 0, ranks: int = 1) -> CountingFiles:
    """A start: the index opened, some batches put together."""
    store = CountingFiles()
    index = open_index((Source(f"{folder}/*.tar"),), None, folder.parent / "run", store=store)
    made, _ = assembler(index, rank, ranks)
    for number in range(batches):
        batch = made.assemble(number, Pixels())
        assert [int(name.split("/")[1]) % 10 for name in batch.names] == batch.labels.tolist()
    return store


EPOCH = SHARDS * SAMPLES // BATCH


def test_no_header_is_read_twice(folder: Path, unseen: None) -> None:
    """Two epochs, a second start of both, of two ranks: each header once, where the first start counts the shards."""
    first = run(folder, 2 * EPOCH)
    assert set(first.headers.values()) == {1}
    assert len(first.headers) == SHARDS * (2 * SAMPLES + 1)
    for rank in range(2):
        assert not run(folder, 2 * EPOCH, rank, 2).headers


def test_no_header_is_read_twice_where_an_index_has_the_counts(folder: Path, unseen: None) -> None:
    run(folder, 0)
    shutil.rmtree(folder / FOLDER)
    assert not run(folder, 0).headers, "none at the start"
    first = run(folder, 2 * EPOCH)
    assert set(first.headers.values()) == {1}
    assert len(first.headers) == SHARDS * (2 * SAMPLES + 1)
    assert not run(folder, EPOCH).headers


@pytest.mark.parametrize("lanes, window", [(LANES, WINDOW), (LANES, 1), (1, 1), (16, 16), (2, 100)])
def test_no_header_is_read_while_a_step_waits(folder: Path, unseen: None, lanes: int, window: int) -> None:
    """After the first batch, whoever takes samples finds their tables there, as long as fetching keeps up."""
    run(folder, 0)
    shutil.rmtree(folder / FOLDER)
    store = CountingFiles()
    index = open_index((Source(f"{folder}/*.tar"),), None, folder.parent / "run", store=store)
    made, order = assembler(index, lanes=lanes, window=window)
    ahead, _ = fetched_ahead(order, SAMPLES, BATCH, 1)
    for number in range(EPOCH + 5):
        made.assemble(number, Pixels())
        _wait_for(folder, order.shards_ahead(number, 0, BATCH, ahead))
        if number == 0:
            store.readers.clear()
    assert store.readers
    assert all(name.startswith("tables") for name in store.readers)


def _wait_for(folder: Path, shards: np.ndarray) -> None:
    deadline = time.monotonic() + 10
    paths = [folder / "index.tables" / f"s{shard:03d}.tar.cls.table" for shard in shards.tolist()]
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_the_tables_of_an_epoch_fit_where_they_are_kept(folder: Path, unseen: None) -> None:
    """A table is read once an epoch, though only those of a few shards are kept."""
    run(folder, 0)
    store = run(folder, EPOCH)
    times = [count for (path, *_), count in store.reads.items() if path.endswith(".table")]
    assert len(times) == SHARDS
    assert max(times) <= 2, "twice where a shard lies at the edge of two lanes, or of the epoch"


@pytest.fixture
def unseen(folder: Path) -> Iterator[None]:
    """The shards as they are before the first start."""
    yield
    for path in [*folder.rglob("*.table"), *folder.glob("*.json")]:
        path.unlink()
