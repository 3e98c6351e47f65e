"""`vitscale doctor CONFIG`: what a run needs, looked at before it, on one process or on all ranks. Nothing is left."""

from __future__ import annotations

import shutil
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import urllib3

from vitscale.config.check import check_config
from vitscale.config.schema import RunConfig
from vitscale.config.step import auto_keys
from vitscale.data.index import store_of, unused_cache
from vitscale.data.index_builder import IndexBuilder
from vitscale.data.patterns import expand
from vitscale.engine.links import LARGE_BYTES, Links, measure_links
from vitscale.engine.ranks import ProcessRanks, joined
from vitscale.errors import VitscaleError
from vitscale.files.decode import choose_decoder
from vitscale.files.store import is_remote
from vitscale.launch.slurm import job_warnings
from vitscale.models.auto import build_model
from vitscale.prepare.image_folder import is_image_folder
from vitscale.run.auto import planned
from vitscale.run.preflight import (
    RankReport,
    data_problem,
    faults,
    folder_problem,
    room_warning,
    signal_problem,
    versions,
)
from vitscale.run.rehearsal import job_of, rehearse
from vitscale.run.session import config_digest
from vitscale.run_folder import BAD_INPUT, DONE, RunFolder
from vitscale.text import aligned, listed, printable, redact
from vitscale.world import World, host, open_files_limit

Level = Literal["ok", "warning", "FAILED"]
_OPEN_FILES = 4096  # a reader's shards, and on rank 0 a connection to each rank
_SHARED_MEMORY = 1 << 30  # a container has 64 MB of it unless it is told otherwise
_CLOCKS_S = 1.0
# What tracking.mlflow_uri may begin with, beside what plugins add.
_MLFLOW = {"http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc"}
_MLFLOW_PLUGINS = "mlflow.tracking_store"
_COUNTED_BYTES = 2 << 30  # of shards that no index has, whose headers are read here
_SLOW_LINK = 2.0  # times the median


class Shard(NamedTuple):
    path: str
    bytes: int


class Finding(NamedTuple):
    """A line of the report."""

    level: Level
    what: str
    text: str  # with the way out, where something is wrong


def doctor(config: RunConfig, world: World, packs: bool = False) -> int:
    """Look at everything and print it from rank 0; DONE, or BAD_INPUT where something would keep the run from starting.

    packs: whether the run takes a folder of images. On several ranks a collective: the same code on each of them.
    """
    shards, findings = _looked_at_once(config, world, packs) if world.is_main else ([], [])
    with joined(replace(world, device="cpu"), config.parallel.timeout_s) as ranks:  # a GPU may be what is broken
        shards = ranks.gather(shards)[0]
        reports = ranks.gather((host(), _of_rank(config, world, shards)))
        findings += _together(reports)
        common = RankReport({"config": config_digest(config), **versions()})
        differing = [Finding("FAILED", "ranks", problem.text) for problem in faults(ranks.gather(common))]
        findings += differing or [Finding("ok", "ranks", _versions_line(world, common))]
        able = all(finding.what != "GPU" or finding.level != "FAILED" for _, found in reports for finding in found)
        if auto_keys(config) and able and not differing:
            findings.append(_of_auto(config, world, ranks))
        if world.world_size > 1:
            findings.append(_clocks(ranks))
            if able:
                findings += _of_links(measure_links(ranks, world), world)
        failed = ranks.gather(any(finding.level == "FAILED" for finding in findings))[0]
        if world.is_main:
            print(aligned([[level, what, printable(redact(text))] for level, what, text in findings]), flush=True)
        ranks.barrier()  # or torchrun would end rank 0 for the code of another before it has spoken
    return BAD_INPUT if failed else DONE


def _versions_line(world: World, report: RankReport) -> str:
    told = [f"{what.removeprefix('version of ')} {value}" for what, value in report.common.items() if what != "config"]
    return f"{world.world_size} on {world.device}: {', '.join(told)}"


# ---- what one process looks at


def _looked_at_once(config: RunConfig, world: World, packs: bool) -> tuple[list[Shard], list[Finding]]:
    """A shard for each rank to look at, and what rank 0 finds."""
    found: list[Finding] = []
    shards: list[Shard] = []

    def look(what: str, work: Callable[[], Iterator[tuple[Level, str]]]) -> None:
        try:
            found.extend(Finding(level, what, text) for level, text in work())
        except VitscaleError as error:
            found.append(Finding("FAILED", what, str(error)))

    look("config", lambda: _of_config(config, world, packs))
    folders = [source.pattern for source in config.data.train if packs and is_image_folder(source.pattern)]
    if folders:
        found.append(Finding("ok", "data", f"{folders[0]}: a folder of images, which the first start packs"))
    else:
        look("data", lambda: _of_data(config, world, shards))
    if shards and all(finding.level != "FAILED" for finding in found):
        broken: list[str] = []
        look("start", lambda: _of_start(config, world, packs, broken.append))
        found += [Finding("warning", "start", line) for line in broken]
    look("room", lambda: _of_room(config))
    look("MLflow", lambda: _of_mlflow(config))
    warnings = job_warnings(config.checkpoint.notice_s)
    if warnings is not None:
        found += [Finding("warning", "Slurm", text) for text in warnings] or [
            Finding("ok", "Slurm", "the job asks for a signal before its end, and may be requeued")
        ]
    return shards, found


def _of_config(config: RunConfig, world: World, packs: bool) -> Iterator[tuple[Level, str]]:
    check_config(job_of(config, world, packs).config, world)
    batch, ranks = config.train.global_batch, world.world_size
    yield "ok", f"its keys fit together for {ranks} rank(s), {batch // ranks} images a step on each"


def _of_data(config: RunConfig, world: World, shards: list[Shard]) -> Iterator[tuple[Level, str]]:
    """Fills `shards`."""
    data = config.data
    store = store_of(data)
    names = expand(data.train, store, "data.train")
    builder = IndexBuilder(names, store, "data.train")
    places = (rank % len(names) for rank in range(world.world_size))
    shards += [Shard(names[place], int(builder.bytes[place])) for place in places]
    if data.index is not None:
        builder.take_from_file(data.index)
    uncounted = 0 if data.index else builder.uncounted(str(RunFolder.at(config.run.dir, config.run.name).path))
    text = f"{len(names)} shards of {builder.bytes.sum() / 1e9:.1f} GB"
    if uncounted:
        way = "; `vitscale index` does it before, in parallel"
        yield "warning", f"{text}, {uncounted} of them not in their index.json: the first start counts them{way}"
    else:
        yield "ok", f"{text}, {int(builder.samples.sum()):,} samples"
    if not is_remote(names[0]):
        try:
            tarfile.TarInfo.frombuf(store.read(names[0], 0, 512), "utf-8", "surrogateescape")
        except (OSError, tarfile.HeaderError) as error:
            yield "FAILED", f"{names[0]}: is no tar file that can be read ({error}); name shards by data.train"
    if line := unused_cache(data, names):
        yield "warning", line
    yield "ok", f"images are decoded by {choose_decoder(data.decode)}"


def _of_start(
    config: RunConfig, world: World, packs: bool, report: Callable[[str], None]
) -> Iterator[tuple[Level, str]]:
    if (uncounted := _uncounted_bytes(config)) > _COUNTED_BYTES:
        text = f"{uncounted / 1e9:.0f} GB of shards are not counted: the first start tells whether they are enough"
        yield "warning", f"{text}, and what their labels are; `vitscale index` first, and this looks at them too"
    else:
        yield "ok", rehearse(job_of(config, world, packs), report)


def _uncounted_bytes(config: RunConfig) -> int:
    """Of the shards whose samples no index has."""
    data, evaluation, store = config.data, config.evaluation, store_of(config.data)
    named = {
        "data.validation": data.validation,
        "evaluation.train": evaluation.train,
        "evaluation.test": evaluation.test,
    }
    named |= {"data.train": data.train} if data.index is None else {}
    total = 0
    for key, sources in named.items():
        if sources:
            builder = IndexBuilder(expand(sources, store, key), store, key)
            builder.uncounted(str(RunFolder.at(config.run.dir, config.run.name).path))
            total += int(builder.bytes[builder.samples == 0].sum())
    return total


def _of_room(config: RunConfig) -> Iterator[tuple[Level, str]]:
    with torch.device("meta"):
        parameters = build_model(config).num_parameters()
    folder = RunFolder.at(config.run.dir, config.run.name).checkpoints
    warning = room_warning(config, folder, parameters)
    text = f"{parameters:,} parameters; {config.checkpoint.keep} checkpoints and one more fit where they are to lie"
    yield ("warning", warning) if warning else ("ok", text)


def _of_mlflow(config: RunConfig) -> Iterator[tuple[Level, str]]:
    uri = config.tracking.mlflow_uri if config.tracking.mlflow else None
    if uri is None:
        yield "ok", "a file in the run's folder" if config.tracking.mlflow else "off"
        return
    scheme, _, rest = uri.partition(":")
    scheme = scheme.lower().partition("+")[0]  # postgresql+psycopg2
    if rest and scheme not in _MLFLOW | {each.name for each in entry_points(group=_MLFLOW_PLUGINS)}:
        yield "warning", f"{redact(uri)}: {scheme} is nothing that MLflow reads: a run trains, and is tracked nowhere"
        return
    if scheme not in ("http", "https"):
        yield "ok", redact(uri)
        return
    try:
        answer = urllib3.request("GET", f"{uri.rstrip('/')}/health", timeout=5.0, retries=False)
    except urllib3.exceptions.HTTPError as error:
        yield "warning", f"{redact(uri)} does not answer ({type(error).__name__}): a run trains all the same"
        return
    fine = answer.status == 200
    yield "ok" if fine else "warning", f"{redact(uri)} answers {'' if fine else f'with HTTP {answer.status}'}".rstrip()


# ---- what each rank looks at


def _of_rank(config: RunConfig, world: World, shards: Sequence[Shard]) -> list[Finding]:
    found = [_of_gpu(config, world), _of_folder(config, world)]
    if shards:
        problem = data_problem(*shards[world.rank], config)
        found.append(Finding("FAILED", "data", problem.text) if problem else Finding("ok", "data", "can be read"))
    if (problem := signal_problem()) is not None:
        found.append(Finding("FAILED", "signals", problem.text))
    limit = open_files_limit()
    few = limit < _OPEN_FILES + 2 * world.world_size
    way = "; raise its hard limit (ulimit -Hn), in a container by --ulimit nofile" if few else ""
    found.append(Finding("warning" if few else "ok", "open files", f"at most {limit:,}{way}"))
    return [*found, _of_shared_memory(world)]


def _of_gpu(config: RunConfig, world: World) -> Finding:
    if world.device == "cpu":
        return Finding("warning", "GPU", "none is visible: a run here would train on the CPU")
    if not torch.cuda.is_available() or torch.cuda.device_count() <= world.local_rank:
        text = f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, and this rank needs number "
        return Finding("FAILED", "GPU", f"{text}{world.local_rank}; look at nvidia-smi and the driver's version")
    name = torch.cuda.get_device_name(world.local_rank)
    if config.train.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("FAILED", "GPU", f"{name} has no bf16; set train.precision=fp32")
    return Finding("ok", "GPU", name)


def _of_folder(config: RunConfig, world: World) -> Finding:
    """By a file in the run's folder, or in the first folder above it that is there."""
    folder = RunFolder.at(config.run.dir, config.run.name).path.absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    problem = folder_problem(there, world.rank)
    return Finding("FAILED" if problem else "ok", "run folder", problem.text if problem else f"{there} can be written")


def _of_shared_memory(world: World) -> Finding:
    path = Path("/dev/shm")
    size = shutil.disk_usage(path).total if path.exists() else 0
    few = world.device == "cuda" and size < _SHARED_MEMORY
    way = "; GPUs of a node exchange through it: give a container more (--shm-size=8g)" if few else ""
    return Finding("warning" if few else "ok", "/dev/shm", f"{size / 1e9:.2f} GB{way}")


# ---- what ranks look at together


def _together(reports: Sequence[tuple[str, list[Finding]]]) -> list[Finding]:
    """One line for what several ranks have found alike. reports: (host, what it found) of each rank."""
    by_finding: dict[Finding, list[str]] = {}
    for rank, (name, found) in enumerate(reports):
        for finding in found:
            by_finding.setdefault(finding, []).append(f"{rank} on {name}")
    lines = []
    for finding, where in by_finding.items():
        those = "all ranks" if len(where) == len(reports) else f"rank{'s' * (len(where) > 1)} {listed(where)}"
        lines.append(finding._replace(text=f"{those}: {finding.text}" if len(reports) > 1 else finding.text))
    return lines


def _of_auto(config: RunConfig, world: World, ranks: ProcessRanks) -> Finding:
    device = torch.device("cuda", world.local_rank) if world.device == "cuda" else torch.device("cpu")
    try:
        return Finding("ok", "auto", f"would be {planned(config, world, ranks, device)}, by the plan")
    except VitscaleError as error:
        return Finding("FAILED", "auto", str(error))


def _clocks(ranks: ProcessRanks) -> Finding:
    ranks.barrier()  # what is left between ranks is far below a second
    clocks = ranks.gather((time.time(), host()))
    ahead, name = max(((clock - clocks[0][0], name) for clock, name in clocks), key=lambda each: abs(each[0]))
    if abs(ahead) <= _CLOCKS_S:
        return Finding("ok", "clocks", "the nodes' agree")
    what = f"{name}'s is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's on {clocks[0][1]}"
    return Finding("warning", "clocks", f"{what}: leases and logs go by them; let them be set by NTP")


def _of_links(links: Links, world: World) -> list[Finding]:
    megabytes = LARGE_BYTES >> 20
    text = f"over {world.world_size} ranks {links.small * 1e3:.2f} ms, of {megabytes} MB {links.large * 1e3:.0f} ms"
    found = [Finding("ok", "all-reduce", text)]
    if links.between:
        one, other, slowest = max(links.between, key=lambda link: link[2])
        usual = statistics.median(seconds for _, _, seconds in links.between)
        text = f"slowest link: {one} to {other}, {megabytes} MB in {slowest * 1e3:.0f} ms (median {usual * 1e3:.0f} ms)"
        slow = slowest > _SLOW_LINK * usual
        way = "; look at its cables and at NCCL_SOCKET_IFNAME, or leave the node out" if slow else ""
        found.append(Finding("warning" if slow else "ok", "all-reduce", text + way))
    return found
