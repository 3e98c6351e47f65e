"""The loader's real reader process on storage that fails for a while, or for good."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.makers import write_shards
from tests.data.stores import TroubledFiles
from tests.data.test_loader import kept, loader, rows, take
from vitscale.data.index import ShardIndex
from vitscale.errors import StorageError
from vitscale.files import retry

ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("shards"), [17, 9, 30, 14])


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """TroubledFiles shortens them: restored at the end."""
    for name in ("_FIRST_WAIT_S", "_LONGEST_WAIT_S"):
        monkeypatch.setattr(retry, name, getattr(retry, name))


@pytest.mark.parametrize("every", [2, 5])
def test_the_reader_goes_on_and_counts(index: ShardIndex, every: int) -> None:
    troubled = take(8, replace(index, store=TroubledFiles(60, ERRORS, every)), micro=16)
    assert rows(troubled) == rows(take(8, index, micro=16))
    assert not any(batch.replaced for batch in troubled), "what passes is no bad sample"
    # Those of the last micro-batches may not be told yet.
    assert sum(batch.retries for batch in troubled) >= 7 * 16 // every


def test_after_the_patience_the_error_requeues(index: ShardIndex) -> None:
    away = replace(index, store=TroubledFiles(0.05, ERRORS, 1))
    with loader(away, micro=16) as batches, pytest.raises(StorageError, match="its storage failed") as caught:
        kept(batches)
    assert caught.value.requeues
    assert any(path in str(caught.value) for path in map(str, map(Path, index.paths)))
