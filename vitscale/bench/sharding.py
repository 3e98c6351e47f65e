"""`vitscale bench sharding`: a step's speed and memory by DDP, ZeRO 1 to 3 and torch's FSDP2, beside what is planned.

All in bf16, on the same inputs, with the same AdamW and clipping. Alone, each turn of a contender is a process of its
own, since an engine leaves memory behind; under torchrun the ranks take them one after the other. Memory is what a
step has in use at most: on a GPU by torch's allocator, on a CPU the bytes of all tensors that are alive, before
anything is compiled there. `planned` is what `vitscale plan` says of the same bytes; it knows nothing of FSDP2.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vitscale import world
from vitscale.bench.gpu_suite.cases import Figures, import_libraries, start_process
from vitscale.bench.gpu_suite.training import LR, batch
from vitscale.bench.measuring import device_name, seconds, start_memory
from vitscale.bench.peers import DTYPES, run_config
from vitscale.bench.rounds import benchmark_parser, figures, first_line, in_turns, report
from vitscale.config.schema import CHECKPOINTING, RunConfig, Train
from vitscale.config.step import accumulation, choices
from vitscale.engine.backend import Backend, prepare
from vitscale.engine.engine import Inputs
from vitscale.engine.optim import make_optimizer
from vitscale.engine.room import is_out_of_memory
from vitscale.errors import ConfigError
from vitscale.inference.command import above_zero
from vitscale.models.auto import build_model, new_model
from vitscale.models.freezing import freeze
from vitscale.planning.live import LiveBytes
from vitscale.planning.memory import activations, memory, parameters

DDP, FSDP2 = "DDP", "FSDP2"
STAGES = {DDP: 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
APART = 0.01  # losses of the first step, relative: autocast and bf16 weights round differently
_COLUMNS = {
    "images/s": "{images_per_second:.1f}",
    "ms a step": "{median_ms:.1f}",
    "of peak": "{utilization:.1%}",
    "MB": "{allocated_mb:,.0f}",
    "MB reserved": "{reserved_mb:,.0f}",
    "MB planned": "{planned_mb:,.0f}",
    "planned / MB": "{accuracy:.3f}",
}
_LETTING_GO_S = 0.2
Step = Callable[[Inputs], float]  # gives the loss


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the last line is JSON."""
    parser = benchmark_parser("sharding", __doc__, rounds=3)
    parser.add_argument("--preset", default="B", metavar="P", help="Ti, S, B, L, H, g or G (default: %(default)s)")
    parser.add_argument("--objective", choices=("mae", "classification"), default="mae", help="(default: mae)")
    parser.add_argument("--batch", type=above_zero, default=16, help="micro-batch of a rank (default: %(default)s)")
    parser.add_argument("--accumulation", type=above_zero, default=1, metavar="N",
                        help="micro-batches of a rank a step (default: %(default)s)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="blocks compiled, as train.compile does")
    parser.add_argument("--gradient-checkpointing", nargs="?", const=True, default=False, choices=CHECKPOINTING[1:],
                        help="as train.gradient_checkpointing (without a word: true)")  # fmt: skip
    parser.add_argument("--steps", type=above_zero, default=10, help="of a turn (default: %(default)s)")
    parser.add_argument("--peak", type=float, default=None, metavar="TFLOPS",
                        help="of one device in bf16, for the share of peak (default: not told)")  # fmt: skip
    options = parser.parse_args(arguments)
    of_process = world.read_world()
    config = config_of(options.preset, options.objective, options.batch, of_process, options.compile,
                       options.gradient_checkpointing, options.accumulation)  # fmt: skip
    if of_process.device == "cpu":
        import_libraries()
    works = {name: partial(measured, name, config, options.steps, of_process) for name in (*STAGES, FSDP2)}
    turns = in_turns(works, options.rounds)
    if of_process.is_main:
        peak = None if options.peak is None else options.peak * of_process.world_size
        result = {"bench": "sharding", **vars(options), "ranks": of_process.world_size,
                  "device": device_name(torch.device(of_process.device)), **compared(turns, config, peak)}  # fmt: skip
        report("A step of ViT-{preset} ({objective}), {accumulation} x {batch} images on each of {ranks} ranks, bf16, "
               "{device}, ratios to DDP".format(**result), _COLUMNS, result)  # fmt: skip
    return 0


def config_of(
    preset: str, objective: str, images: int, of_process: world.World, compiled: bool, again: bool | str,
    accumulated: int = 1,
) -> RunConfig:  # fmt: skip
    """A run whose ranks take so many images a micro-batch; again: train.gradient_checkpointing; accumulated: how many
    micro-batches a step."""
    train = Train(global_batch=accumulated * images * of_process.world_size, micro_batch=images, precision="bf16",
                  compile=compiled, gradient_checkpointing=again)  # fmt: skip
    return replace(run_config(preset, objective), train=train)


def compared(
    turns: Mapping[str, Sequence[Figures]], config: RunConfig, peak_tflops: float | None = None
) -> dict[str, Any]:
    """The `contenders` by name, and who is `left_out` and why, from the figures of every turn of each.

    peak_tflops: of all devices together, for `utilization`.
    """
    losses = [one["losses"][0] for ones in turns.values() for one in ones if "losses" in one]
    problems = {name: next(filter(None, (problem(one, losses[0] if losses else None) for one in ones)), None)
                for name, ones in turns.items()}  # fmt: skip
    times = {name: [one["seconds"] for one in ones] for name, ones in turns.items() if problems[name] is None}
    contenders = figures(times, DDP if DDP in times else None)
    for name, figure in contenders.items():
        figure |= {key: value for key, value in turns[name][-1].items() if key not in figure}
        figure |= in_megabytes(figure)
        figure["images_per_second"] = rate = config.train.global_batch / figure["median_ms"] * 1000
        figure["utilization"] = utilization(config, rate, peak_tflops)
    return {"contenders": contenders, "left_out": {name: why for name, why in problems.items() if why}}


def utilization(config: RunConfig, images_per_second: float, peak_tflops: float | None) -> float | None:
    """The share of the devices' peak that a model's operations take, as `vitscale bench step` tells it."""
    if peak_tflops is None:
        return None
    with torch.device("meta"):
        return images_per_second * build_model(config).flops_per_image() / (peak_tflops * 1e12)


def in_megabytes(figure: Figures) -> Figures:
    """Of what a turn told of memory; None for what it did not. accuracy: what was planned over what was allocated."""
    given = {kind: figure.get(f"{kind}_bytes") for kind in ("allocated", "reserved", "planned")}
    allocated, planned = given["allocated"], given["planned"]
    found = {f"{kind}_mb": None if count is None else count / 1e6 for kind, count in given.items()}
    return found | {"accuracy": planned / allocated if planned and allocated else None}


def problem(figure: Figures, loss: float | None) -> str | None:
    """Why these figures do not count: an error, or a first loss that is not `loss`."""
    if "error" in figure:
        planned = figure.get("planned_bytes")
        return figure["error"] + ("" if planned is None else f"; planned: {planned / 1e9:.2f} GB")
    own = figure["losses"][0]
    if loss is not None and not abs(own - loss) <= APART * abs(loss):
        return f"the loss of its first step is {own:.5f}, others' {loss:.5f}: more than {APART:.0%} apart"
    return None


def measured(name: str, config: RunConfig, steps: int, of_process: world.World) -> Figures:
    """All that `measure` tells of a turn, even where the process that did it was killed."""
    config = replace(config, parallel=replace(config.parallel, zero_stage=STAGES.get(name, 0)))
    arguments = (config, name == FSDP2, steps, of_process)
    told: Figures = {}
    if of_process.world_size > 1:
        for part in measure(*arguments):
            told |= part
        return told
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = start_process(of_process.device, _send, sender, *arguments)
    sender.close()
    with receiver, contextlib.suppress(EOFError):
        while True:
            told |= receiver.recv()
    process.join()
    if process.exitcode:
        killed = process.exitcode < 0
        how = f"signal {-process.exitcode}" if killed else f"exit code {process.exitcode}"
        told |= {"error": f"its process ended with {how}", "out_of_memory": False}
    return told


def _send(sender: Connection, *arguments: Any) -> None:
    for part in measure(*arguments):
        sender.send(part)


def measure(config: RunConfig, fsdp2: bool, steps: int, of_process: world.World) -> Iterator[Figures]:
    """The figures of one turn, each as soon as it is known: what is planned, then what is measured or the error."""
    try:
        choices(config, of_process)
    except ConfigError as refusal:  # a run would be refused too
        yield {"error": first_line(refusal), "out_of_memory": False}
        return
    if not fsdp2:
        of_step = activations(config, of_process.device).of(config.train.micro_batch)
        needed = memory(config, of_process, parameters(config), of_step)
        yield {"planned_bytes": needed.allocated_bytes - needed.inputs}  # here no next batch is on its way
    try:
        with closing(Backend(config, of_process)) as backend:
            yield _steps(backend, config, fsdp2, steps)
    except Exception as error:  # whatever a library, a compiler or the memory has against it
        traceback.print_exc()
        yield {"error": first_line(error), "out_of_memory": is_out_of_memory(error)}


def _steps(backend: Backend, config: RunConfig, fsdp2: bool, steps: int) -> Figures:
    device, cuda = backend.device, backend.device.type == "cuda"
    counts = not cuda and not fsdp2  # FSDP2 resizes what a weight lies in, which no operation tells
    before = start_memory(device) if cuda else 0
    live = LiveBytes()
    with contextlib.ExitStack() as counting:
        if counts:
            counting.enter_context(torch.autograd.set_multithreading_enabled(False))  # else nobody counts its thread
            counting.enter_context(live)
        step = (_fsdp2 if fsdp2 else _engine)(backend, config)
        inputs = batch(config, backend.world.rank, device)
        losses = [step(inputs)]  # it makes what later ones keep
        live.start_again()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        losses.append(step(inputs))
    if counts:  # gloo's threads let go of `live` by the interpreter, for which a group's end lets nobody in
        time.sleep(_LETTING_GO_S)
    step(inputs)  # what is compiled on a CPU is so only where nobody counts
    times = [seconds(partial(step, inputs), device=device) for _ in range(steps)]
    found: Figures = {"losses": losses, "seconds": statistics.median(times)}
    if cuda:
        found["allocated_bytes"] = torch.cuda.max_memory_allocated(device) - before
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    elif counts:
        found["allocated_bytes"] = live.peak
    return found


def _engine(backend: Backend, config: RunConfig) -> Step:
    model = new_model(config, config.run.seed)
    freeze(model, config.train.freeze)
    engine = backend.wrap(model, config)
    return lambda inputs: engine.step([inputs] * engine.accumulation, LR).loss


def _fsdp2(backend: Backend, config: RunConfig) -> Step:
    """Our model as torch's documentation shards one, by block and as a whole; its shards are the fp32 masters."""
    model = new_model(config, config.run.seed).to(backend.device)
    prepare(model, config, backend.device)
    mesh = init_device_mesh(backend.device.type, (backend.world.world_size,))
    # Inputs stay as they are, as in our engine: the model casts pixels where they meet its weights.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=DTYPES[config.parallel.reduce_dtype],
                                  cast_forward_inputs=False)  # fmt: skip
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = make_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = LR
    weights, micro_batches = list(model.parameters()), accumulation(config, backend.world)

    def step(inputs: Inputs) -> float:
        losses: list[Tensor] = []
        for left in reversed(range(micro_batches)):
            sharded.set_requires_gradient_sync(left == 0)
            loss = model(**inputs).loss / micro_batches
            loss.backward()
            losses.append(loss.detach())
        norm: Any = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if torch.isfinite(norm.full_tensor()):  # the host waits for it, as in our engine
            if config.optimizer.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(weights, config.optimizer.clip, norm)
            optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).sum())

    return step
