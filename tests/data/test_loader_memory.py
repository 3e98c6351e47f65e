"""What a reader holds: huge images, and a hundred thousand batches."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.makers import encoded, photo, pixels, write_tar
from tests.data.test_loader import SETTINGS, loader, reader_of
from vitscale.data.index import build_index
from vitscale.data.order import SequentialOrder

pytestmark = pytest.mark.full


def resident(pid: int | str) -> int:
    """Bytes that a process has now."""
    found = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return 1024 * int(found[1])


def test_nothing_grows_over_a_hundred_thousand_batches(tmp_path: Path) -> None:
    """Neither in the reader nor beside it; some thirty epochs of 200 shards, of whose tables a few are kept."""
    files = [photo(i, 16, 16) for i in range(16)]
    shards = [
        write_tar(tmp_path / f"{shard:03d}.tar", [(f"{shard:03d}-{i}.jpg", files[i]) for i in range(16)])
        for shard in range(200)
    ]
    index = build_index([str(path) for path in shards])
    held = []
    with loader(index, batch=4, data=replace(SETTINGS, window=16)) as batches:
        for number in range(100_001):
            batch = next(batches)
            batches.release(batch)
            del batch
            if number in (10_000, 50_000, 100_000):
                held.append((resident(reader_of(batches)), resident("self"), len(os.listdir("/proc/self/fd"))))
    print([[f"{size / 1e6:.1f} MB" for size in each[:2]] for each in held])
    (_, first_own, first_files), (reader, *_), (last_reader, last_own, last_files) = held
    assert last_reader - reader < 4e6, "what malloc still takes after 50,000 gets less and less"
    assert last_own - first_own < 4e6
    assert last_files <= first_files


@pytest.mark.parametrize(("kind", "count"), [("JPEG", 64), ("WEBP", 8), ("TIFF", 8), ("PNG", 8)])
def test_huge_images_take_little_memory(tmp_path: Path, kind: str, count: int) -> None:
    """64 photographs of 50 million pixels a micro-batch, JPEGs of some 20 MB, or 8 of other kinds: the reader stays
    below 1 GB."""
    noise = np.random.default_rng(0).integers(-12, 12, (5792, 8688, 1), dtype=np.int8)
    image = np.clip(pixels(1, 5792, 8688).astype(np.int16) + noise, 0, 255).astype(np.uint8)
    data = encoded(image, kind, **({"quality": 85} if kind in ("JPEG", "WEBP") else {}))
    assert len(data) > 5e6
    index = build_index([str(write_tar(tmp_path / "a.tar", [(f"{i:03d}.jpg", data) for i in range(count)]))])
    settings = replace(SETTINGS, decode="auto", prefetch=2)
    size = (224, 224)
    order = SequentialOrder(index.samples, count)
    with loader(index, batch=count, micro=count, data=settings, order=order, image_size=size) as batches:
        batch = next(batches)
        assert min(batch.heights) >= 448
        assert batch.pixels.nbytes < count * 896 * 896 * 3 * 4 / 3
        batches.release(batch)
        peak = batches.reader_memory()
    print(f"the reader's peak: {peak / 1e6:.0f} MB; decoded pixels: {batch.pixels.nbytes / 1e6:.0f} MB")
    assert 100e6 < peak < 1e9
