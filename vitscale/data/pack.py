"""A folder of images -> WebDataset shards with an index: the same folder and options give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vitscale.data.index import ShardIndex, build_index
from vitscale.errors import DataError
from vitscale.files.atomic import replaced
from vitscale.files.classes import CLASSES
from vitscale.files.header import IMAGE_KINDS
from vitscale.text import listed

Report = Callable[[str], None]


@dataclass(frozen=True)
class PackedSample:
    """One sample to be: a file (bytes kept as they are) or bytes in memory."""

    key: str
    kind: str  # the image's extension, in lower case
    source: Path | bytes
    label: int | None = None

    def members(self) -> dict[str, str | bytes]:
        """As webdataset's TarWriter takes it."""
        image = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        label = {} if self.label is None else {"cls": str(self.label).encode()}
        return {"__key__": self.key, self.kind: image, **label}

    @property
    def bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def pack(
    folder: Path,
    out: Path,
    *,
    shard_samples: int = 5000,
    shard_bytes: int = 512 << 20,
    held_out: float = 0.0,
    workers: int | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    report: Report = print,
) -> dict[str, ShardIndex]:
    """Write the images of `folder` as shards; the indexes by split.

    folder: one folder a class (labels are the sorted folders' places, kept in classes.json), or images side by
    side without labels. out: must not exist or be empty; holds the shards and index.json, or with held_out > 0
    train/ and test/ of them, an image's split being a hash of its name: adding images moves none. Samples are
    shuffled by hash, so that classes mix. A shard ends at shard_samples images or shard_bytes. classes: names by
    label where they are not the folders' own, as of images that a model of more classes is to be scored on.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out}: must be in [0, 1), the share of images set apart for testing")
    if shard_samples < 1 or shard_bytes < 1:
        raise DataError(f"shard_samples={shard_samples}, shard_bytes={shard_bytes}: must be above 0")
    samples, classes = _find(Path(folder), classes)
    splits: dict[str, list[PackedSample]] = {"": samples}
    if held_out > 0:
        splits = {"train": [], "test": []}
        for sample in samples:
            splits["test" if _draw(sample.key, "split", seed) < held_out * 2**64 else "train"].append(sample)
        empty = [name for name, chosen in splits.items() if not chosen]
        if empty:
            raise DataError(f"held_out={held_out}: of {len(samples)} images none falls into {empty[0]}/; change it")
    make_empty(Path(out))
    if classes:
        (Path(out) / CLASSES).write_text(json.dumps(classes, ensure_ascii=False, indent=1) + "\n")
    indexes = {}
    for name, chosen in splits.items():
        shards = _cut(sorted(chosen, key=lambda s: _draw(s.key, "order", seed)), shard_samples, shard_bytes)
        indexes[name] = write_shards(shards, Path(out) / name, name or "shard", workers)
        report(f"{Path(out) / name}: {indexes[name].total} images in {len(shards)} shards")
    if classes:
        count = len(classes)
        report(f"{Path(out) / CLASSES}: {count} classes; to train by labels: model.num_labels={count}")
    return indexes


def make_empty(out: Path) -> None:
    """Make a folder; DataError when there is one with something in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(out.iterdir())
    except FileExistsError:
        occupied = True
    except OSError as error:
        raise DataError(f"{out}: cannot be made: {error.strerror}; name a folder of your own") from None
    if occupied:
        raise DataError(f"{out}: exists and is not an empty folder; name a new one or empty it")


def write_shards(
    shards: Sequence[Sequence[PackedSample]], out: Path, name: str, workers: int | None = None
) -> ShardIndex:
    """Write out/NAME-000000.tar and so on, in parallel processes, and their index.json with sha256."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}-{number:06d}.tar" for number in range(len(shards))]
    workers = min(workers or len(os.sched_getaffinity(0)), len(shards))
    if workers == 1:
        digests = list(map(_write_shard, paths, shards))
    else:
        _tar_writer(io.BytesIO())  # imports webdataset before the fork, once
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            digests = list(pool.map(_write_shard, paths, shards))
    index = build_index([str(path) for path in paths], digests)
    wrong = [path for path, count, shard in zip(paths, index.samples, shards, strict=True) if count != len(shard)]
    assert not wrong, f"{wrong} do not hold what was written"
    index.save(out / "index.json")
    return index


def _write_shard(path: Path, samples: Iterable[PackedSample]) -> str:
    """Write one shard; its sha256 in hex. It appears under its name only when whole."""
    with replaced(path) as draft, open(draft, "wb") as file:
        hashed = _Hashed(file)
        with _tar_writer(hashed) as writer:
            for sample in samples:
                writer.write(sample.members())
    return hashed.digest.hexdigest()


class _Hashed(io.RawIOBase):
    """A file to write to that hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        return self._file.write(data)


def _tar_writer(stream: BinaryIO | io.RawIOBase) -> Any:
    """webdataset's TarWriter; imported late, since it brings torch."""
    from webdataset.writer import TarWriter

    return TarWriter(stream, encoder=False, mtime=0, user="", group="", compress=False)


def _draw(key: str, purpose: str, seed: int) -> int:
    """64 bits hashed from a sample's name: they stay when other images are added."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed} {key}".encode(), digest_size=8).digest(), "big")


def _cut(samples: list[PackedSample], most_samples: int, most_bytes: int) -> list[list[PackedSample]]:
    """Samples in runs of at most so many and so many bytes (one at least)."""
    shards: list[list[PackedSample]] = []
    held = 0
    for sample in samples:
        size = sample.bytes
        if not shards or len(shards[-1]) >= most_samples or held + size > most_bytes:
            shards.append([])
            held = 0
        shards[-1].append(sample)
        held += size
    return shards


def class_folders(folder: Path) -> list[str]:
    """The names of a folder's classes, by their labels; none where it is flat."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _find(folder: Path, classes: Sequence[str] | None) -> tuple[list[PackedSample], Sequence[str]]:
    """All images of a folder with their labels, and the names of the classes (none where it is flat)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one with images, or with one folder of images a class")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = class_folders(folder)
    classes = folders if classes is None else classes
    if others := [name for name in folders if name not in classes]:
        raise DataError(
            f"{folder / others[0]}: is none of the classes {listed(classes)}; rename the folder or remove it"
        )
    loose = [entry for entry in entries if entry.is_file() and _kind(entry) in IMAGE_KINDS]
    if folders and loose:
        raise DataError(
            f"{folder}: has images ({loose[0].name}) beside folders ({folders[0]}): "
            "put all images into class folders, or all side by side"
        )
    images: list[tuple[Path, int | None]] = [(path, None) for path in loose]
    for name in folders:
        inside = sorted(path for path in (folder / name).rglob("*") if _kind(path) in IMAGE_KINDS and path.is_file())
        inside = [path for path in inside if not path.name.startswith(".")]
        if not inside:
            raise DataError(f"{folder / name}: is a class folder without images; fill or remove it")
        images += [(path, classes.index(name)) for path in inside]
    if not images:
        raise DataError(f"{folder}: holds no images ({', '.join(IMAGE_KINDS)})")
    return _named(folder, images), classes if folders else ()


def _named(folder: Path, images: list[tuple[Path, int | None]]) -> list[PackedSample]:
    """Samples keyed by their path: a key ends at the first dot of the file's name, so dots become underscores."""
    samples, taken = [], set()
    for path, label in images:
        relative = path.relative_to(folder)
        stem = relative.with_name(relative.name[: -len(path.suffix)].replace(".", "_")).as_posix()
        stem = stem.encode(errors="backslashreplace").decode()
        if stem.startswith("__"):  # webdataset passes over names like __this__
            stem = "x" + stem
        key, number = stem, 1
        while key in taken:
            number += 1
            key = f"{stem}~{number}"
        taken.add(key)
        samples.append(PackedSample(key, _kind(path), path, label))
    return samples


def _kind(path: Path) -> str:
    return path.suffix[1:].lower()
