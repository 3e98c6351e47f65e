"""How an index is built: from what the store, index files and tables say of its shards."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from vitscale.data.declared import declared_counts
from vitscale.data.index_file import Rows, is_current, read_rows, write_rows
from vitscale.data.parallel import report
from vitscale.data.sidecar import Shard, Sidecar, count_samples, fallback_name
from vitscale.errors import DataError
from vitscale.files.retry import unreadable
from vitscale.files.store import FileStat, LocalFiles, Store, is_remote

Result = TypeVar("Result")
_THREADS = 16  # a file system far away answers many questions at once
_PART = 512  # paths that a thread takes at once
_LOOKED_AT = 4  # shards at URLs whose declared counts are held against them at once
_SLOW_S = 100e-6  # of one stat: from here on several threads are faster, below it they only wait for each other


class IndexBuilder:
    """An index whose shards' paths, sizes and times are known, while their samples are counted."""

    def __init__(self, paths: Sequence[str], store: Store, key: str = "the pattern") -> None:
        """key: what names the shards. DataError for a shard that is not there, and for one that is named twice."""
        self.paths, self.store = paths, store
        self.folders = sorted({path[: path.rfind("/") + 1] for path in paths})  # "" or with a slash at the end
        self._first: dict[str, str] = {}  # folder with its links resolved -> as it is written first
        self._written = {folder: self._first.setdefault(_real(folder), folder) for folder in self.folders}
        aliases = any(folder != first for folder, first in self._written.items())
        self._places = dict(zip(map(self._canonical, paths) if aliases else paths, range(len(paths)), strict=True))
        if len(self._places) < len(paths):
            twice = next(path for i, path in enumerate(paths) if self._places[self._canonical(path)] != i)
            raise DataError(f"{twice}: is named twice by {key}; name each shard once")
        self.bytes, self.modified = stat_all(store, paths)
        self.samples = np.zeros(len(paths), dtype=np.int64)  # 0: not known yet
        self.sha256 = np.full(len(paths), None, dtype=object)

    @property
    def rows(self) -> Rows:
        return Rows(self.paths, self.samples, self.bytes, self.sha256.tolist(), self.modified)

    @cached_property
    def by_folder(self) -> dict[str, list[int]]:
        """The places of each folder's shards."""
        folders: dict[str, list[int]] = {folder: [] for folder in self.folders}
        for i, path in enumerate(self.paths):
            folders[_folder(path)].append(i)
        return folders

    def places(self, rows: Rows) -> np.ndarray:
        """Where each of the rows has its shard here: int64, -1 where it is none of these."""
        find = self._places.get
        places = [find(path, -1) for path in rows.paths]
        if -1 in places:
            places = [find(self._canonical(path), -1) for path in rows.paths]
        return np.array(places, dtype=np.int64)

    def _canonical(self, path: str) -> str:
        """The same for all ways to write a folder, whose links are resolved once."""
        end = path.rfind("/") + 1
        folder = path[:end]
        first = self._written.get(folder)
        if first is None:
            real = _real(folder)
            first = self._written[folder] = self._first.get(real, real)
        return path if first == folder else first + path[end:]

    def take(self, rows: Rows, chosen: np.ndarray, places: np.ndarray) -> None:
        """The counts of the `chosen` rows are those of the shards at `places`."""
        self.samples[places] = rows.samples[chosen]
        self.sha256[places] = np.array(rows.sha256, dtype=object)[chosen]

    def take_from_file(self, index_path: str) -> None:
        """Every shard's row from the file that data.index names. DataError where one is missing or other."""
        self._take_rows(index_path)
        left = np.flatnonzero(self.samples == 0).tolist()
        if left:  # links to shards that have rows?
            links = {os.path.realpath(self.paths[i]): i for i in left if not is_remote(self.paths[i])}
            self._places = links | self._places
            self._take_rows(index_path)
        for i in np.flatnonzero(self.samples == 0)[:1].tolist():
            raise DataError(
                f"data.index={index_path}: has no row for {self.paths[i]}; make it again with `vitscale index`"
            )

    def _take_rows(self, index_path: str) -> None:
        for rows in read_rows(self.store, index_path):
            places = self.places(rows)
            ours = np.flatnonzero(places >= 0)
            places = places[ours]
            for i in np.flatnonzero(rows.bytes[ours] != self.bytes[places])[:1].tolist():
                raise DataError(
                    f"{self.paths[places[i]]}: has {self.bytes[places[i]]} bytes, data.index={index_path} says "
                    f"{rows.bytes[ours[i]]}; bring the shard back or make the index again with `vitscale index`"
                )
            self.take(rows, ours, places)

    def uncounted(self, fallback: str) -> int:
        """Take the rows of the folders' index.json that are not stale; how many shards have none. Writes nothing."""
        for folder in self.folders:
            self._take_fresh(_FolderFiles(folder, self.store, fallback))
        return int((self.samples == 0).sum())

    def take_from_folders(self, sidecar: Sidecar, fallback: str) -> None:
        """Every shard's row: from its folder's index.json where it is not stale; the others are counted, which is
        written there, or else in a file of the folder `fallback`.

        What other tools declare is held against what is counted: DataError. Of shards at URLs, which are read whole to
        be counted, it is held against a few alone, and taken for the others.
        """
        files = {folder: _FolderFiles(folder, self.store, fallback) for folder in self.folders}
        outdated: dict[int, tuple[int, int, str | None]] = {}
        for each in files.values():
            outdated |= self._take_fresh(each)
        stale = np.flatnonzero(self.samples == 0).tolist()
        if not stale:
            return
        changed = sorted({_folder(self.paths[i]) for i in stale})
        claims = {folder: declared_counts(self.store, folder) for folder in changed}
        declared = {i: claims[_folder(self.paths[i])].get(os.path.basename(self.paths[i])) for i in stale}
        far = [i for i in stale if is_remote(self.paths[i]) and declared[i] is not None]
        unseen = set(far) - set(far[:: -(-len(far) // _LOOKED_AT) or 1])
        for i, claim in declared.items():
            self.samples[i] = claim.samples if claim is not None else 0
        self.count([i for i in stale if i not in unseen], sidecar)
        for i in outdated.keys() & set(stale):  # a packer's sha256 stays while size and count do
            samples, size, sha256 = outdated[i]
            if (samples, size) == (self.samples[i], self.bytes[i]):
                self.sha256[i] = self.sha256[i] or sha256
        rows = list(zip(*self.rows, strict=True))
        for folder in changed:
            if seen := [rows[i] for i in self.by_folder[folder] if i not in unseen]:
                files[folder].save(seen, self)

    def _take_fresh(self, files: _FolderFiles) -> dict[int, tuple[int, int, str | None]]:
        """Take a folder's rows that are not stale; of the others, place -> (samples, bytes, sha256)."""
        outdated = {}
        for rows, current in files.rows():
            places = self.places(rows)
            ours = np.flatnonzero(places >= 0)
            places = places[ours]
            far = np.array([is_remote(self.paths[place]) for place in places], dtype=bool)
            fresh = far | (rows.modified[ours] == self.modified[places])  # as files.store.same_file
            fresh &= current & (rows.bytes[ours] == self.bytes[places])
            self.take(rows, ours[fresh], places[fresh])
            for row, place in zip(ours[~fresh].tolist(), places[~fresh].tolist(), strict=True):
                outdated[place] = int(rows.samples[row]), int(rows.bytes[row]), rows.sha256[row]
        return outdated

    def count(self, places: Sequence[int], sidecar: Sidecar, workers: int | None = None) -> None:
        """Count the samples of these shards by their tables, and learn the sha256 of those that say it.

        workers: processes; None: see on_shards. DataError where `samples` has another count than 0 for one, and it
        does not hold so many.
        """
        shards = [
            Shard(self.paths[i], FileStat(int(self.bytes[i]), int(self.modified[i])), int(self.samples[i]) or None,
                  self.sha256[i]) for i in places
        ]  # fmt: skip
        for i, counted in zip(places, count_samples(sidecar, shards, workers=workers), strict=True):
            self.samples[i], self.sha256[i] = counted.samples, counted.sha256 or self.sha256[i]


class _FolderFiles:
    """The index.json of a folder of shards, and what stands for it where it is another tool's or cannot be written."""

    def __init__(self, folder: str, store: Store, fallback: str) -> None:
        self._beside = (store, os.path.join(folder, "index.json"))
        self._fallback = (LocalFiles(), os.path.join(fallback, fallback_name(folder, ".json")))

    def rows(self) -> Iterator[tuple[Rows, bool]]:
        """Rows of both, and whether they were counted by the rules of now; none where there is no file, or from where
        it is not ours on."""
        for store, path in (self._fallback, self._beside):
            with contextlib.suppress(DataError, OSError):
                current = is_current(store, path)
                yield from ((rows, current) for rows in read_rows(store, path))

    def save(self, ours: list[tuple[Any, ...]], builder: IndexBuilder) -> None:
        """These rows of the builder, and the rows of shards that it does not have, while they exist."""
        store, beside = self._beside
        others: dict[str, Any] = {}
        for rows, _ in self.rows():
            missing = builder.places(rows) < 0
            others |= {row[0]: row for row, kept in zip(zip(*rows, strict=True), missing.tolist(), strict=True) if kept}
        there = [row for row in others.values() if _exists(store, row[0])]
        paths, samples, size, sha256, modified = zip(*sorted([*ours, *there]), strict=True)
        rows = Rows(paths, np.array(samples), np.array(size), sha256, np.array(modified))
        others_own = _exists(store, beside) and not self._is_ours()
        for place in [self._fallback] if others_own else [self._beside, self._fallback]:
            try:
                write_rows(*place, rows)
                return
            except OSError as error:
                why = error
        report(f"{beside}: the index cannot be kept ({why}), so its shards are looked at again at the next start")

    def _is_ours(self) -> bool:
        try:
            return any(len(rows.paths) for rows in read_rows(*self._beside))
        except DataError:
            return False


def _exists(store: Store, path: str) -> bool:
    try:
        store.stat(path)
    except OSError:
        return False
    return True


def stat_all(store: Store, paths: Sequence[str]) -> np.ndarray:
    """int64 [2, paths]: the bytes and the time of each. DataError names one that cannot be had."""
    began = time.perf_counter()
    first, rest = _stats(store, paths[:_PART]), paths[_PART:]
    if time.perf_counter() - began < _SLOW_S * _PART:
        return np.concatenate([first, _stats(store, rest)], axis=1)
    parts = [rest[start : start + _PART] for start in range(0, len(rest), _PART)]
    return np.concatenate([first, *_in_threads(lambda part: _stats(store, part), parts)], axis=1)


def _stats(store: Store, paths: Sequence[str]) -> np.ndarray:
    try:
        stats = np.fromiter(chain.from_iterable(map(store.stat, paths)), dtype=np.int64, count=2 * len(paths))
    except FileNotFoundError as error:
        why = "no such file" if error.strerror == os.strerror(error.errno or 0) else error.strerror
        raise DataError(f"{error.filename}: {why}; check the path and the brace range") from None
    except OSError as error:
        raise unreadable(str(error.filename), error) from None
    return stats.reshape(-1, 2).T


def _folder(path: str) -> str:
    """A path's folder, "" or with a slash at the end."""
    return path[: path.rfind("/") + 1]


def _real(folder: str) -> str:
    """A folder ("" or with a slash at the end) with its links resolved, with a slash at the end; a URL as it is."""
    return folder if is_remote(folder) else os.path.join(os.path.realpath(folder), "")


def _in_threads(work: Callable[[Any], Result], items: Sequence[Any]) -> list[Result]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))
