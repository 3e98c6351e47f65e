"""With what a rank ends that ran out of memory: what it is told to set, and whether it is started again."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests.integration.test_auto import large, recommended
from vitscale.config.schema import Objective, Run, RunConfig
from vitscale.config.step import with_step
from vitscale.engine.ranks import ProcessRanks
from vitscale.engine.room import Room
from vitscale.errors import ConfigError
from vitscale.planning.plan import Cluster, Planner, advice
from vitscale.run.auto import prove, ran_out, settle
from vitscale.run.job import Job
from vitscale.run.shortage import out_of_memory
from vitscale.run_folder import BAD_INPUT, STOPPED, RunFolder, exit_code
from vitscale.world import World

WORLD = World(world_size=8, local_world_size=8)
OF_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
OF_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
)


def of_batch(objective: str, stage: int, micro: int, checkpoints: bool = False) -> RunConfig:
    """checkpoints: whether gradient checkpointing may be recommended, whose steps take seconds to count."""
    config = large(batch=512)
    config = replace(config, train=replace(config.train, cuda_graphs=not checkpoints))
    return with_step(replace(config, objective=Objective(name=objective)), stage, micro)


def failed(config: RunConfig, error: Exception, room: int) -> Exception:
    job = Job(config, WORLD)
    job.room = Room(room, "of the GPU's memory")
    return out_of_memory(error, job)


@pytest.mark.parametrize(
    ("objective", "stage", "checkpoints"),
    [
        *(("classification", stage, False) for stage in (0, 2)),
        *(pytest.param(objective, stage, True, marks=pytest.mark.full)
          for objective in ("classification", "mae") for stage in range(4)),
    ],
)  # fmt: skip
def test_what_failed_is_never_recommended(objective: str, stage: int, checkpoints: bool) -> None:
    """Nor anything that needs as much by the plan, which has just been wrong, or right."""
    planner = Planner(of_batch(objective, stage, 64, checkpoints), Cluster.of(WORLD, 85 * 10**9))
    config, before = planner.config, 10**12
    for _ in range(4):  # as who follows the advice, and fails again
        needed = planner.estimate(config).memory.total_bytes
        assert needed < before
        error = failed(config, OF_GPU, 85 * 10**9)
        assert exit_code(error) == BAD_INPUT
        before, config = needed, recommended(str(error), config) or planner.config
        if config == planner.config:
            assert "no ZeRO stage fits" in str(error)
            break


def test_where_nothing_fits_the_optimizer_is_offloaded() -> None:
    """Of a model whose weights weigh more than its activations, on one GPU."""
    config, world = of_batch("classification", 0, 64), World(device="cuda")
    config = replace(config, model=replace(config.model, hidden_size=2048, intermediate_size=8192))
    room = 3 * 10**9
    assert Planner(config, Cluster.of(world, room)).fastest() is None
    said = advice(config, world, room)
    assert "this fits, with Adam's state and step on the CPU: parallel.offload_optimizer=true parallel.zero_" in said
    assert "not with parallel.offload_optimizer either: take larger or more GPUs" in advice(config, world, room // 2)


@pytest.mark.parametrize(
    ("error", "room", "code", "words"),
    [
        (OF_CPU, 10**12, STOPPED, "the machine has no memory left"),
        (OF_CPU, 10**8, BAD_INPUT, "train.micro_batch=64: ran out of memory ("),
        (MemoryError(), 10**12, STOPPED, "(MemoryError)"),
        (MemoryError(), 10**8, BAD_INPUT, "; by `vitscale plan` "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 10**12, STOPPED, "; by `vitscale plan` this fits"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 10**6, BAD_INPUT, "take more memory, or more machines"),
    ],
)
def test_a_machine_s_memory_by_what_the_plan_needs_of_it(error: Exception, room: int, code: int, words: str) -> None:
    """Where there was enough of it for the plan, others have it, and the same start may succeed."""
    found = failed(of_batch("classification", 0, 64), error, room)
    assert exit_code(found) == code
    assert words in str(found)
    assert "\n" not in str(found)


@pytest.fixture
def own_limit() -> Iterator[None]:
    """A limit of address space that is never reached."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 46, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("own_limit")
def test_under_a_limit_of_its_own_it_would_end_so_again() -> None:
    config = of_batch("classification", 0, 64)
    found = failed(config, OF_CPU, 10**12)
    assert exit_code(found) == BAD_INPUT
    assert recommended(str(found), config) != config
    at_the_start = out_of_memory(MemoryError(), Job(config, WORLD))
    assert exit_code(at_the_start) == BAD_INPUT
    assert "ulimit -v" in str(at_the_start)


def test_what_auto_chose_is_chosen_smaller_by_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same command, until nothing is left."""
    config = replace(large(batch=4), run=Run(dir=str(tmp_path)))
    sizes, more = [], True
    while more:
        job = Job(config, World())
        job.folder.path.mkdir(exist_ok=True)
        job.config, job.room = chosen(config, job.folder), Room(10**12, "as told")
        sizes.append(job.config.train.micro_batch)
        error = out_of_memory(OF_CPU, job)
        assert exit_code(error) == STOPPED
        more = "; the same command now chooses less" in str(error)
    assert sizes == [4, 2, 1]
    said = capsys.readouterr().out
    assert "auto: the last start had parallel.zero_stage=0 train.micro_batch=4, which ran out of memory: chosen" in said
    assert "; parallel.zero_stage=0 train.micro_batch=4 ran out of memory before; the activations of" in said
    with pytest.raises(ConfigError, match=r"nothing fits .*micro_batch=1 ran out of memory before; .*checkpointing="):
        chosen(config, job.folder)


def test_a_choice_is_kept_once_a_save_has_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = large(batch=4), RunFolder(tmp_path)
    chosen(config, folder)
    chosen(config, folder)
    said = capsys.readouterr().out
    assert "train.micro_batch=4, and ended before it saved a checkpoint: chosen anew" in said
    assert "kept" not in said
    prove(folder)
    chosen(config, folder)
    assert "; kept from the last start" in capsys.readouterr().out
    ran_out(folder, with_step(config, 0, 4))
    assert chosen(config, folder).train.micro_batch == 2
    prove(folder)
    assert chosen(config, folder).train.micro_batch == 2
    assert "; kept from the last start" in capsys.readouterr().out


def test_with_more_memory_what_ran_out_is_tried_again(tmp_path: Path) -> None:
    config, folder = large(batch=4), RunFolder(tmp_path)
    chosen(config, folder)
    ran_out(folder, with_step(config, 0, 4))
    record = json.loads(folder.auto.read_text())
    record["ran_out"]["room"] = 1
    folder.auto.write_text(json.dumps(record))
    assert chosen(config, folder).train.micro_batch == 4


def chosen(config: RunConfig, folder: RunFolder) -> RunConfig:
    """What a start chooses, which notes more memory than there is: what others leave of it changes meanwhile."""
    found = settle(config, World(), ProcessRanks(timedelta(seconds=60)), torch.device("cpu"), folder)
    folder.auto.write_text(json.dumps(json.loads(folder.auto.read_text()) | {"room": 10**15}))
    return found
