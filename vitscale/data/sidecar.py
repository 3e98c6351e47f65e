"""Tables beside their shards: a shard's headers are read once, by whoever needs them first.

The table of FOLDER/NAME.tar for labels in .cls members is FOLDER/index.tables/NAME.tar.cls.table; another label
has a file of its own, so that runs with different labels do not undo each other's. Where FOLDER cannot be written
it lies in a folder that the index names (that of data.index, the run's). A table holds as long as the shard has the
size and the time of its scan; one that does not, or that is damaged, is reported and made again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from urllib.parse import quote

from vitscale.data import table as tables
from vitscale.data.table import SampleTable
from vitscale.errors import DataError
from vitscale.files.store import FileStat, LocalFiles, Store, absolute
from vitscale.files.tar import scan_shard

FOLDER = "index.tables"
_FIRST_READ = 1 << 18  # bytes; most tables are smaller
_NEXT_READ = 1 << 22
_THREADS = 16  # of a process that makes many tables
_WORTH_A_PROCESS = 256 << 20  # bytes of shards
_TICK_NS = 20_000_000  # no kernel's file times are coarser,
_WHOLE_SECONDS_NS = 2_000_000_000  # but those of some file systems are: they keep whole seconds, or every other one
_REPORT_EVERY_S = 10.0
_MOST_REPORTS = 20
_reports = itertools.count()
Report = Callable[[str], None]


def report(line: str) -> None:
    """To standard error, as the reader process has it too."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Shard:
    """A shard whose table is wanted."""

    path: str
    stat: FileStat
    samples: int | None = None  # that it must hold, where an index says so


@dataclass(frozen=True)
class Sidecar:
    """The tables of shards for one label."""

    store: Store
    label: str
    fallback_folders: tuple[str, ...]  # local, for tables that cannot lie beside their shards; the first is preferred
    image: str | None = None  # the extension of the members with images; None: told by extension or content

    def table(self, shard: Shard) -> SampleTable:
        """From its file where that holds, else by a scan that leaves one.

        DataError where the shard is damaged, or does not hold the samples that it must.
        """
        wrong = []
        for store, path in self._places(shard.path):
            try:
                return self._load(store, path, shard)
            except (FileNotFoundError, NotADirectoryError, PermissionError):  # a bucket may hide what it does not have
                continue
            except OSError as error:
                wrong.append(f"{path}: cannot be read ({error.strerror})")
            except ValueError as error:
                wrong.append(f"{path}: {error}")
        for what in wrong:
            _report_few(f"{what}; the table is made again from {shard.path}")
        _wait_for_next_tick(shard.stat)
        scanned = scan_shard(shard.path, self.store, self.label, shard.stat, self.image)
        if scanned.passed_over:
            what = f"{scanned.passed_over} members belong to no sample, as {scanned.example}"
            _report_few(f"{shard.path}: {what}: they are passed over")
        made = tables.make_table(scanned, shard.stat, self.label, self.image)
        if shard.samples not in (None, len(made)):
            raise DataError(
                f"{shard.path}: holds {len(made)} samples, the index says {shard.samples}; "
                "make a new index (vitscale index) for a new run, or bring the old shard back"
            )
        self._save(shard.path, made)
        return made

    def count(self, shards: Sequence[Shard]) -> list[int]:
        """How many samples each shard holds; their tables are made where there are none."""
        with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
            return list(pool.map(lambda shard: len(self.table(shard)), shards))

    def _places(self, path: str) -> Iterator[tuple[Store, str]]:
        folder, name = os.path.split(path)
        kinds = self.label if self.image is None else f"{self.label}.{self.image}"
        name = f"{name}.{quote(kinds, safe='')}.table"
        yield self.store, os.path.join(folder, FOLDER, name)
        for fallback in self.fallback_folders:
            yield LocalFiles(), os.path.join(fallback, fallback_name(folder, ".tables"), name)

    def _load(self, store: Store, path: str, shard: Shard) -> SampleTable:
        """The table in a file. OSError or ValueError where there is none, or none of the shard as it is."""
        data = store.read(path, 0, _FIRST_READ)
        whole = tables.whole_length(data)
        while len(data) < whole and (more := store.read(path, len(data), _NEXT_READ)):
            data += more
        table = tables.from_bytes(data)
        wanted = (self.label, self.image, shard.stat, shard.samples or len(table))
        if (table.label, table.image, table.shard, len(table)) != wanted:
            raise ValueError("is of another state of the shard")
        return table

    def _save(self, path: str, made: SampleTable) -> None:
        data = tables.to_bytes(made)
        for store, place in self._places(path):
            try:
                store.write(place, data)
                return
            except OSError as error:
                why = error
        _report_few(f"{path}: its table cannot be kept ({why}), so its headers are read again at the next start")


def _wait_for_next_tick(stat: FileStat) -> None:
    """Wait until a file that is written to from now on gets another time than it has, or no one would see it.

    By this machine's clock: where a file server's differs, what is written as soon may stay unseen.
    """
    tick = _TICK_NS if stat.modified % 1_000_000_000 else _WHOLE_SECONDS_NS
    age = time.time_ns() - stat.modified
    if 0 <= age < tick:
        time.sleep((tick - age) / 1e9)


def _report_few(line: str) -> None:
    """Report a line of which there may be one a shard: the first ones of this process."""
    number = next(_reports)
    if number < _MOST_REPORTS:
        report(line)
    elif number == _MOST_REPORTS:
        report("tables: more of them are made again or not kept, for reasons as above")


def fallback_name(folder: str, ending: str) -> str:
    """What stands for a folder of shards in the run's folder."""
    return f"index-{hashlib.sha256(os.fsencode(absolute(folder))).hexdigest()[:8]}{ending}"


def count_samples(sidecar: Sidecar, shards: Sequence[Shard], say: Report = report) -> list[int]:
    """How many samples each shard holds, their tables made in parallel, with a line every few seconds.

    Nodes that start at once begin at different shards, so that each finds tables that others have made.
    """
    first = zlib.crc32(socket.gethostname().encode()) % max(1, len(shards))
    shards = [*shards[first:], *shards[:first]]
    size = sum(shard.stat.bytes for shard in shards)
    workers = max(1, min(len(os.sched_getaffinity(0)), len(shards), size // _WORTH_A_PROCESS))
    part = max(1, min(_THREADS * 4, len(shards) // (workers * 4)))
    parts = [shards[start : start + part] for start in range(0, len(shards), part)]
    counts: list[int] = []
    started = reported = time.monotonic()
    pool: Executor = ProcessPoolExecutor(workers, get_context("fork")) if workers > 1 else ThreadPoolExecutor(1)
    with pool:
        for some in pool.map(sidecar.count, parts):
            counts += some
            now = time.monotonic()
            if now - reported >= _REPORT_EVERY_S:
                reported = now
                left = (now - started) * (len(shards) / len(counts) - 1)
                say(f"tables: {len(counts):,} of {len(shards):,} shards, {sum(counts):,} samples, {left:.0f} s left")
    return counts[len(counts) - first :] + counts[: len(counts) - first]
