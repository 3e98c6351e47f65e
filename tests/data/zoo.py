"""The zoo's shards through the real path, in a process of its own: `python -m tests.data.zoo FIRST COUNT FOLDER`.

A line of JSON a shard on stdout: its number, samples delivered and reported, what is wrong about what became of it. Who
hangs is ended with the stacks of its threads on stderr; who crashes has left the number in FOLDER/begun.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from tests.data import zoo_images, zoo_tars
from tests.data.zoo_tars import Tar
from vitscale.config.schema import Source
from vitscale.data.assemble import Assembler, Plan
from vitscale.data.crop import CenterCrop
from vitscale.data.index import ShardIndex, open_index
from vitscale.data.labels import LabelReader
from vitscale.data.order import SequentialOrder
from vitscale.errors import DataError, VitscaleError
from vitscale.files.tar import scan_shard
from vitscale.text import ignore_warnings_of_pillow

MAX_PIXELS = 1_000_000
PEAK_MIB = 64  # above what the process has when a shard is begun: some images of MAX_PIXELS, and copies of them
BACKSTOP = 4 << 30  # bytes of address space above that: what a fault can cost this machine
SECONDS = 20  # for one shard
LONG_AGO = 10**18  # nanoseconds; a table of a file that was just written is waited for
BATCH = 4
DECODERS = ("nvimgcodec", "simplejpeg", "pillow")


class Pixels:
    """A micro-batch's memory in this process."""

    def __init__(self) -> None:
        self.array = np.zeros(1 << 20, dtype=np.uint8)

    def reserve(self, count: int) -> np.ndarray:
        if count > len(self.array):
            self.array = np.concatenate([self.array, np.zeros(count - len(self.array), np.uint8)])
        return self.array


@dataclass
class Visit:
    """One shard from the bytes to the pixels, twice: as it is found, and as one that was indexed while it was whole."""

    path: Path
    tar: Tar
    decoder: str
    channels: int
    target: tuple[int, int] | None  # what boxes are resized to: simplejpeg decodes at a DCT scale where it is small
    pixels: Pixels
    delivered: int = 0  # samples
    reported: int = 0
    refused: int = 0  # shards

    def faults(self) -> list[str]:
        return [*self._as_found(), *self._after_it_was_indexed(LONG_AGO), *self._after_it_was_indexed(LONG_AGO + 10**9)]

    def _as_found(self) -> list[str]:
        self._write(self.tar.bytes, LONG_AGO)
        try:
            index = self._index()
        except DataError as error:
            self.refused += 1
            named = [] if str(self.path) in str(error) and "\n" not in str(error) else [f"names no shard: {error}"]
            return named + ([f"refused: {error}"] if self.tar.fate == zoo_tars.TAKEN else [])
        if self.tar.fate == zoo_tars.REFUSED:
            return [f"taken, with {index.total} samples"]
        scanned = scan_shard(str(self.path))
        files, known = len(scanned.kind) + scanned.passed_over, self.tar.fate == zoo_tars.TAKEN
        faults = [] if self.tar.files in (None, files) else [f"{files} members of {self.tar.files}"]
        faults += [f"keys {sorted(scanned.keys)}"] if known and set(scanned.keys) != set(self.tar.images) else []
        return faults + self._read(index, self.tar.images if known else {})

    def _after_it_was_indexed(self, modified: int) -> list[str]:
        """Where the time of the file is as before, nobody can see at the start that it changed."""
        self._write(zoo_tars.joined(self.tar.members), LONG_AGO)
        index = self._index()
        self._write(self.tar.bytes, modified)
        return self._read(index, {})

    def _write(self, data: bytes, modified: int) -> None:
        self.path.write_bytes(data)
        os.utime(self.path, ns=(modified, modified))

    def _index(self) -> ShardIndex:
        return open_index((Source(str(self.path)),), None, self.path.parent / "cache")

    def _read(self, index: ShardIndex, fates: dict[str, str]) -> list[str]:
        """Every sample of the index is delivered, or reported, or an error names the shard."""
        plan = Plan(
            index=index, order=SequentialOrder(index.samples, BATCH), crop=CenterCrop(1.0), decoder=self.decoder,
            channels=self.channels, background=255, max_pixels=MAX_PIXELS, image_size=self.target, image_bytes=None,
            extension="cls",
            labels=LabelReader(), seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, ranks=1, first_batch=0,
            threads=2, prefetch=1, table_samples=100_000, ahead=0,
        )  # fmt: skip
        delivered, reported = [], []
        assembler = Assembler(plan)
        for number in range(plan.micro_batches or 0):
            try:
                batch = assembler.assemble(number, self.pixels)
            except VitscaleError as error:
                return [] if self.path.stem in str(error) else [f"names no shard: {error}"]
            bad = {item.slot: item.key for item in batch.replaced}
            for slot in np.flatnonzero(batch.repeats == 0).tolist():
                reported += [bad[slot]] if slot in bad else []
                delivered += [batch.names[slot].split("/", 1)[1]] if slot not in bad else []
                batch.image(slot)
        self.delivered, self.reported = self.delivered + len(delivered), self.reported + len(reported)
        table = index.table(0, "cls")
        there = sorted(table.key(place) for place in range(len(table)))
        faults = [] if sorted(delivered + reported) == there else [f"{there} became {delivered} and {reported}"]
        if self.channels != 4:  # few images have four
            faults += [f"good, but reported: {key}" for key in reported if fates.get(key) == zoo_images.GOOD]
        return faults + [f"bad, but delivered: {key}" for key in delivered if fates.get(key) == zoo_images.BAD]


def _mib(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) // 1024


def visit(number: int, folder: Path, pixels: Pixels) -> tuple[int, int, int, list[str]]:
    """How many samples of shard `number` were delivered and reported, whether it was refused, and what is wrong."""
    random = Random(number)
    tar = zoo_tars.draw(random)
    path = folder / f"s{number}.tar"
    target = random.choice([None, (8, 8), (32, 24)])
    guest = Visit(path, tar, random.choice(DECODERS), random.choice([1, 3, 3, 4]), target, pixels)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured anew
    before = _mib("VmRSS")
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        faults = guest.faults()
    except Exception:  # what a user would see as a traceback
        faults = [traceback.format_exc()]
    faulthandler.cancel_dump_traceback_later()
    peak = _mib("VmHWM") - before
    faults += [f"took {peak} MiB"] if peak > PEAK_MIB else []
    path.unlink()
    for left in (folder / "index.tables" / f"{path.name}.cls.table", folder / "index.json"):
        left.unlink(missing_ok=True)
    return guest.delivered, guest.reported, guest.refused, [f"{tar.change}: {fault}" for fault in faults]


def main(first: int, count: int, folder: Path) -> None:
    out, said = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(2), "w", buffering=1)
    for stream in (1, 2):  # what C libraries print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    faulthandler.enable(said)
    sys.stderr = said
    os.fsync = lambda descriptor: None  # thousands of small files, none of which is to last
    ignore_warnings_of_pillow()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    zoo_images.make_all()
    pixels = Pixels()
    for number in range(-8, 0):  # libraries load, pools fill
        visit(number, folder, pixels)
    size = _mib("VmSize") << 20
    resource.setrlimit(resource.RLIMIT_AS, (size + BACKSTOP, size + BACKSTOP))
    with (folder / "begun").open("w", buffering=1) as begun:
        for number in range(first, first + count):
            print(number, file=begun)
            print(json.dumps([number, *visit(number, folder, pixels)]), file=out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
