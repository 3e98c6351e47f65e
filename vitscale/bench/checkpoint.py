"""`vitscale bench checkpoint`: what a save and a resume cost, on one rank, for a ViT of any size.

First with an engine, beside DeepSpeed's own checkpoint and torch.distributed.checkpoint. Then the pieces of a larger
model, which lie in memory: seconds that training stands still, with and without the background, and GB/s beside the
disk's own (dd, of the same bytes, to the same folder). Last the manifest of very many ranks under ZeRO-3: what rank 0
does to publish it, and what each rank does to open it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitscale.bench import checkpoint_peers
from vitscale.bench.measuring import seconds
from vitscale.bench.rounds import benchmark_parser, figures, in_turns, report_sections, show
from vitscale.checkpoint.fragments import Piece, Table, copied, join_tables
from vitscale.checkpoint.manifest import FORMAT, MANIFEST, as_text, read_manifest
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.saving import Saver
from vitscale.checkpoint.store import Checkpoint, SoleRank, open_checkpoint
from vitscale.config.load import config_of
from vitscale.inference.command import above_zero
from vitscale.models.auto import build_model

DISK, BEHIND, WAITED, LOAD = "dd with fsync", "a save: the step waits", "a save: all of it", "a load, verified"
PUBLISH, OPEN = "rank 0 publishes", "a rank opens"
_READERS = 4
KINDS = ("param", "exp_avg", "exp_avg_sq")
Shapes = dict[str, tuple[int, ...]]


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("checkpoint", __doc__, rounds=3)
    parser.add_argument("--engine", default="L", metavar="PRESET", help="of the engine (default: %(default)s)")
    parser.add_argument("--preset", default="H", help="of the model in memory (default: %(default)s)")
    parser.add_argument("--large", nargs="*", default=["g", "G"], metavar="PRESET", help="of manifests (default: g G)")
    parser.add_argument("--ranks", type=above_zero, default=512, help="of manifests (default: %(default)s)")
    parser.add_argument("--folder", help="on the disk to be measured (default: a temporary one)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-", dir=options.folder) as folder:
        sections = {
            "engine": _with_engine(Path(folder) / "engine", options.engine, options.rounds),
            "memory": _save_and_load(Path(folder), options.preset, options.rounds),
        }
        for preset in options.large:
            sections[f"manifest {preset}"] = _manifest(Path(folder), preset, options.ranks, options.rounds)
    report_sections({"bench": "checkpoint", **vars(options)}, sections)
    return 0


def shapes_of(preset: str) -> Shapes:
    """The parameters of a MAE ViT."""
    with torch.device("meta"):
        model = build_model(config_of({"model.preset": preset}, []))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def zero3_tables(shapes: Shapes, ranks: int) -> list[Table]:
    """What each rank tells of its pieces of weights and moments, where every tensor is divided among all of them."""
    tables: list[Table] = []
    for rank in range(ranks):
        pieces = []
        for kind in KINDS:
            for name, shape in shapes.items():
                size, share = prod(shape), -(-prod(shape) // ranks)
                if (count := min(share, size - rank * share)) > 0:
                    pieces.append(Piece(kind, name, shape, rank * share, np.broadcast_to(np.float32(0), count)))
        table = Table.of(pieces)
        known = any(table.digest == other.digest for other in tables[-1:])
        tables.append(replace(table, tensors=None) if known else table)
    return tables


def _with_engine(folder: Path, preset: str, rounds: int) -> dict[str, Any]:
    folder.mkdir()
    result = {"contenders": checkpoint_peers.measure(preset, rounds, folder, partial(_dd, folder / "dd"))}
    columns = {"ms": "{median_ms:.0f}", "bytes": "{bytes:,}", "GB/s": "{rate:.2f}"}
    show(f"A checkpoint of a MAE ViT-{preset}'s engine, ZeRO-2, one rank, fp32", columns, result)
    shutil.rmtree(folder)
    return result


def _save_and_load(folder: Path, preset: str, rounds: int) -> dict[str, Any]:
    pieces = [
        Piece(kind, name, shape, 0, np.random.default_rng(0).standard_normal(prod(shape), np.float32))
        for kind in KINDS
        for name, shape in shapes_of(preset).items()
    ]
    count = sum(piece.values.nbytes for piece in pieces)
    with Saver(folder / "saved", SoleRank(), Retention(1)) as saver:

        def begin() -> None:
            saver.begin(1, lambda reserve: copied(pieces, reserve), {}, required=True)

        def wait() -> None:
            saver.wait()
            if saver.error is not None:
                raise saver.error

        def behind() -> float:
            waited = seconds(begin)
            wait()
            return waited

        behind()  # makes the memory, and what is read below
        works: dict[str, Callable[[], float]] = {
            DISK: partial(seconds, partial(_dd, folder / "dd", count)),
            BEHIND: behind,
            WAITED: partial(seconds, behind),
            LOAD: partial(seconds, partial(_read, folder / "saved" / "step_00000001")),
        }
        times = in_turns(works, rounds)
        from_disk = _read_together(folder / "saved" / "step_00000001")
    contenders = figures(times, DISK)
    for figure in contenders.values():
        figure["rate"] = count / 1e6 / figure["median_ms"]
    result = {"bytes": count, "from_disk": from_disk / count, "contenders": contenders}
    title = f"A checkpoint of a MAE ViT-{preset}, {count / 1e9:.2f} GB, by one rank"
    print(f"{_READERS} processes that load it at once read {from_disk / count:.2f} times its size from the disk")
    show(title, {"ms": "{median_ms:.0f}", "GB/s": "{rate:.2f}"}, result)
    return result


def _read_together(folder: Path) -> int:
    """Bytes that the ranks of a node would bring from the disk: what one has read is in the system's cache for all."""
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ProcessPoolExecutor(_READERS, multiprocessing.get_context("spawn")) as processes:
        return sum(processes.map(_read, [folder] * _READERS))


def _read(folder: Path) -> int:
    def from_disk() -> int:
        return int(re.search(r"\nread_bytes: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]

    before = from_disk()
    checkpoint = open_checkpoint(folder, SoleRank())
    for kind, name in checkpoint.tensors:
        checkpoint.whole(kind, name)
    return from_disk() - before


def _dd(path: Path, count: int) -> None:
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=8M", f"count={count}", "iflag=count_bytes", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    path.unlink()


def _manifest(folder: Path, preset: str, ranks: int, rounds: int) -> dict[str, Any]:
    tables = zero3_tables(shapes_of(preset), ranks)
    files = [{"name": f"state-{rank:05d}.safetensors", "bytes": 1, "sha256": "0" * 64} for rank in range(ranks)]
    path = folder / MANIFEST

    def publish() -> None:
        tensors = [record.as_json() for record in join_tables(tables)]
        path.write_text(as_text({"format": FORMAT, "step": 1, "state": {}, "files": files, "tensors": tensors}))

    def opened() -> None:
        Checkpoint(folder, read_manifest(folder))

    publish()
    times = in_turns({PUBLISH: partial(seconds, publish), OPEN: partial(seconds, opened)}, rounds)
    pieces, size = sum(len(table.counts) for table in tables), path.stat().st_size
    result = {"bytes": size, "pieces": pieces, "contenders": figures(times, None)}
    title = f"The manifest of a MAE ViT-{preset} of {ranks} ranks at ZeRO-3: {pieces:,} pieces, {size:,} bytes"
    show(title, {"ms": "{median_ms:.0f}"}, result)
    return result
