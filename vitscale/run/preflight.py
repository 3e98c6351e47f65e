"""What each rank looks at before a run, and what must be the same on all: one exchange tells all that is wrong."""

from __future__ import annotations

import hashlib
import platform
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import vitscale
from vitscale.config.schema import RunConfig
from vitscale.data.index import ShardIndex
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import LaunchError, StorageError, VitscaleError, failed_storage
from vitscale.files.atomic import flush_to_disk
from vitscale.files.retry import UnavailableError
from vitscale.files.store import is_remote
from vitscale.files.stores import Stores
from vitscale.text import listed
from vitscale.world import World, host

_LIBRARIES = ("torch", "deepspeed", "accelerate", "numpy")
_DRIVER = Path("/sys/module/nvidia/version")
_PATIENCE_S = 10.0  # with storage, here: a start that fails is to say so within half a minute
_TOLD = 20  # faults in one message
_HEADER = 512  # bytes of a tar's first header


class Problem(NamedTuple):
    """Why a rank cannot run this."""

    text: str  # what is wrong, and the way out
    may_pass: bool = False  # whether the same start may succeed later, with nothing mended


@dataclass(frozen=True)
class RankReport:
    """What one rank tells the others."""

    common: Mapping[str, str]  # what must be the same on all ranks, by name
    problems: Sequence[Problem] = ()
    host: str = field(default_factory=host)


def require_ready(ranks: ProcessRanks, own: RankReport) -> None:
    """A collective. LaunchError, the same on every rank, that names all that is wrong on any; StorageError where all of
    it may pass by itself."""
    found = faults(ranks.gather(own))
    if not found:
        return
    kind = StorageError if all(problem.may_pass for problem in found) else LaunchError
    texts = [problem.text for problem in found]
    more = f"; and {len(texts) - _TOLD} more" if len(texts) > _TOLD else ""
    raise kind(f"preflight: {'; '.join(texts[:_TOLD])}{more}")


def faults(reports: Sequence[RankReport]) -> list[Problem]:
    """What is wrong on the ranks, whose reports these are; the same fault of one host's ranks is one."""
    first, found = reports[0], dict[tuple[str, Problem], list[int]]()
    for rank, report in enumerate(reports):
        differing = [
            Problem(
                f"has another {what} ({report.common.get(what)}) than rank 0 on {first.host} ({value}): start all "
                "ranks with one command, from one environment, on one shared folder"
            )
            for what, value in first.common.items()
            if report.common.get(what) != value
        ]
        for problem in (*report.problems, *differing):
            found.setdefault((report.host, problem), []).append(rank)
    return [
        Problem(f"rank{'s' * (len(those) > 1)} {listed(those)} on {where} {problem.text}", problem.may_pass)
        for (where, problem), those in found.items()
    ]


def versions() -> dict[str, str]:
    """Of what computes: this package's code, its libraries, the GPU's driver."""
    found = {"version of vitscale": vitscale.__version__, "code of vitscale": code_digest()}
    found["version of Python"] = platform.python_version()
    for name in _LIBRARIES:
        try:
            found[f"version of {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[f"version of {name}"] = "not known"
    found["NVIDIA driver"] = _DRIVER.read_text(encoding="ascii").strip() if _DRIVER.exists() else "none"
    return found


def code_digest() -> str:
    """12 hex digits: a hash of the package's files."""
    package, digest = Path(vitscale.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def problems(config: RunConfig, world: World, checkpoints: Path, index: ShardIndex) -> list[Problem]:
    """What keeps this rank from running: its first shard, the folder of the checkpoints, its signals."""
    shard = world.rank % len(index.paths)
    looked_at = (
        data_problem(index.paths[shard], int(index.bytes[shard]), config),
        folder_problem(checkpoints, world.rank),
        signal_problem(),
    )
    return [problem for problem in looked_at if problem is not None]


def data_problem(path: str, size: int, config: RunConfig) -> Problem | None:
    """Of a shard of so many bytes: whether this rank can read it, and sees the same file."""
    store = Stores(patience_s=min(_PATIENCE_S, config.data.patience_s))
    try:
        seen = store.stat(path).bytes
        header = b"" if is_remote(path) else store.read(path, 0, _HEADER)  # stat has read a remote one
    except OSError as error:
        way = "let every node mount it and every rank read it"
        return Problem(f"cannot read data.train: {path}: {error.strerror or error}; {way}", _may_pass(error))
    except VitscaleError as error:  # of this node's clock, credentials, names: the others do not have it
        return Problem(f"cannot read data.train: {error}", error.requeues)
    if seen != size or (header and len(header) < min(size, _HEADER)):
        return Problem(f"sees another file than rank 0 at {path}: {seen} bytes, not {size}; mount the same storage")
    return None


def folder_problem(folder: Path, rank: int) -> Problem | None:
    """Whether this rank can write, flush and remove a file in the folder, which is made."""
    probe = folder / f".preflight-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"1")
            flush_to_disk(probe)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        way = "set run.dir to a folder that every rank can write"
        return Problem(f"cannot write to {folder}: {error.strerror or error}; {way}", _may_pass(error))
    return None


def signal_problem() -> Problem | None:
    """Whether a TERM would reach this process."""
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return Problem("would not notice a preemption: what started it has blocked SIGTERM; start it without that")
    return None


def room_warning(config: RunConfig, folder: Path, parameters: int) -> str | None:
    """A warning where the disk of the checkpoints' folder, or of the first one above it that is there, has no room for
    all that are kept and one more."""
    kinds = 3 if config.train.ema_decay is None else 4  # weights, two moments, their average: fp32
    needed = 4 * kinds * parameters * (config.checkpoint.keep + 1)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(there).free
    if free + held >= needed:
        return None
    return (
        f"{folder}: {free / 1e9:.1f} GB are free, and checkpoint.keep={config.checkpoint.keep} checkpoints and one "
        f"more take {(needed - held) / 1e9:.1f} GB further: make room, or lower checkpoint.keep"
    )


def _may_pass(error: OSError) -> bool:
    return isinstance(error, UnavailableError) or failed_storage(error) is not None
