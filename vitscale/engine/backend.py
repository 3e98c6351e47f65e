"""The process group, and accelerate's DDP (stage 0) or DeepSpeed's ZeRO (stages 1 to 3) set up over it.

The only importer of accelerate and deepspeed. Every key that matters is written here: "auto" values
and library defaults differ between versions, and some of them silently train something else.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from vitscale.config.schema import RunConfig
from vitscale.config.step import LIVE_ELEMENTS, accumulation, bucket_elements
from vitscale.engine import affinity
from vitscale.engine.ddp import DDPEngine
from vitscale.engine.engine import Engine
from vitscale.engine.graphs import graph_blocks
from vitscale.engine.optim import ScaledAdamW
from vitscale.engine.ranks import ProcessRanks, join, meeting
from vitscale.engine.zero import ZeroEngine
from vitscale.engine.zero_host import know_signature
from vitscale.errors import ConfigError, LaunchError
from vitscale.models.attention import attend_in_float32
from vitscale.text import to_stderr
from vitscale.world import World, forget_deepspeed

_COMPILERS = ("gcc", "clang", "cc")
_LETTING_GO_S = 0.1


class Backend:
    """The process group, and by `wrap` the engine that trains."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """Join the process group. Raises LaunchError where the ranks cannot meet."""
        self.world = world
        self._linear = torch.nn.functional.linear  # ZeRO-3 puts another in its place
        self._accelerator: Any = None  # made once the run's stage and micro-batch are known
        _import_libraries()
        self.device = torch.device(world.device)
        if world.device == "cuda":
            self.device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(self.device)
        if world.world_size > 1:
            join(world, _collectives(world), config.parallel.timeout_s)
        self.ranks = ProcessRanks(timedelta(seconds=config.parallel.timeout_s))
        pinned = affinity.pin(self.ranks, self.device) if config.parallel.pin_cores else None
        if pinned and world.is_main:
            to_stderr(pinned)

    def _accelerated(self, config: RunConfig, trained: int) -> Any:
        """The accelerator, of the first config and model that are asked for. LaunchError where it sees other ranks than
        the launcher gave."""
        if self._accelerator is not None:
            return self._accelerator
        world = self.world
        with meeting(world, config.parallel.timeout_s):
            accelerator = _make_accelerator(config, world, trained)
        seen = (accelerator.process_index, accelerator.num_processes, self.ranks.world_size)
        if seen != (world.rank, world.world_size, world.world_size):
            raise LaunchError(
                f"accelerate sees rank {seen[0]} of {seen[1]} (process group of {seen[2]}), the launcher gave rank "
                f"{world.rank} of {world.world_size}: ranks would train apart; start with launch/torchrun.sh"
            )
        self._accelerator = accelerator
        return accelerator

    def wrap(
        self,
        model: nn.Module,
        config: RunConfig,
        lr_scales: Mapping[str, float] | None = None,
        undecayed: Container[str] = (),
    ) -> Engine:
        """Shard and compile `model` (initialized, on the CPU, equal on all ranks) for training.

        Parameters that do not require a gradient are frozen. lr_scales: factors of the learning rate by
        parameter, 1 where a name is missing; undecayed: parameters without weight decay beside biases and norms.
        """
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        accelerator = self._accelerated(config, trained)
        prepare(model, config, self.device)
        if config.train.cuda_graphs:
            if self.device.type != "cuda":
                raise ConfigError("train.cuda_graphs=true: needs an NVIDIA GPU; leave it out, or false, on a CPU")
            graph_blocks(model, accumulates=accumulation(config, self.world) > 1)
        if config.parallel.zero_stage == 3:
            _fetch_by_block(model)
        engine = DDPEngine if config.parallel.zero_stage == 0 else ZeroEngine
        return engine(accelerator, model, config, self.world, self.ranks, lr_scales or {}, undecayed)

    def close(self) -> None:
        """Leave the process group, and what accelerate and DeepSpeed keep of it: another Backend may follow."""
        import deepspeed
        from accelerate.state import AcceleratorState, GradientState

        # gloo's threads let go of the last exchanges, and of what torch keeps beside them, by the interpreter; the end
        # of a group, which waits for these threads, lets nobody in.
        time.sleep(_LETTING_GO_S)
        if deepspeed.comm.is_initialized():  # first: it keeps groups of its own, which accelerate does not know
            deepspeed.comm.destroy_process_group()
        if self._accelerator is not None:
            self._accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # Both are process-wide: the next Accelerator would believe in this one's stage and process group.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        forget_deepspeed()
        torch.nn.functional.linear = self._linear


def prepare(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Set up torch, and a plain model, for training as the config says."""
    if config.train.gradient_checkpointing:
        selective = config.train.gradient_checkpointing == "selective"
        model.gradient_checkpointing_enable(selective=selective)  # type: ignore[operator]
    if device.type == "cpu" and config.train.precision == "bf16":
        attend_in_float32(model)
    if config.train.compile:
        if not any(map(shutil.which, _COMPILERS)):
            raise ConfigError(
                f"train.compile=true: torch.compile needs a C compiler ({' or '.join(_COMPILERS)}); there is none "
                "on the PATH of this node; install one there, or set train.compile=false"
            )
        # DDP's buckets would cut every block in pieces; as a block is small, reduction overlaps backward anyway.
        torch._dynamo.config.optimize_ddp = False
        # Beyond it torch goes on uncompiled: encoders and decoders, in training and evaluation, of any batch.
        torch._dynamo.config.recompile_limit = 64
        model.compile_blocks()  # type: ignore[operator]
    model.train()
    if config.train.deterministic != torch.are_deterministic_algorithms_enabled():  # it imports the compiler
        torch.use_deterministic_algorithms(config.train.deterministic)
    if device.type == "cuda":
        # fp32 is fp32; beside bf16, what is still multiplied in fp32 (the resize) may use TF32.
        torch.backends.cudnn.allow_tf32 = config.train.precision == "bf16"
        torch.set_float32_matmul_precision("high" if config.train.precision == "bf16" else "highest")


def _fetch_by_block(model: nn.Module) -> None:
    """Let ZeRO-3 gather and reduce a block as a whole: fewer and larger exchanges, and a graph of all of it.

    Not where parameters are frozen: DeepSpeed takes a block's gradients once that of its input is there, and
    without one too early.
    """
    from deepspeed.utils import set_z3_leaf_module

    if all(parameter.requires_grad for parameter in model.parameters()):
        for block in model.blocks():  # type: ignore[operator]
            set_z3_leaf_module(block, True)


def _import_libraries() -> None:
    """While rank 0 may still look for the data.

    Without what nobody uses here and costs seconds of a start: MLflow, for DeepSpeed's autotuner, and torch's compiler,
    to which DeepSpeed hands functions of its Muon, a module that it imports whatever the optimizer.
    """
    import accelerate  # noqa: F401

    with _without("mlflow"):
        from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_


def _make_accelerator(config: RunConfig, world: World, trained: int) -> Any:
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # accelerate and DeepSpeed still use names that torch has newer ones for.
    for module in ("torch.distributed", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    timeout = timedelta(seconds=config.parallel.timeout_s)
    group = InitProcessGroupKwargs(backend=_collectives(world), timeout=timeout)
    if config.parallel.zero_stage == 0:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        precision = "bf16" if config.train.precision == "bf16" else "no"
        return Accelerator(cpu=world.device == "cpu", mixed_precision=precision, kwargs_handlers=[group, ddp])
    # What it does not know it warns of, and ours steps flat tensors as torch's AdamW does.
    deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(ScaledAdamW)
    # A C++ op for CPU collectives that would be compiled at the first start; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.parallel.zero_stage == 3:
        _hush_stage_3()

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Nothing: it would import transformers, and tell it of ZeRO-3, whose models are not used here."""

    plugin = Plugin(hf_ds_config=zero_config(config, world, trained), zero3_init_flag=False)
    # With cpu=True accelerate would silently give DDP instead.
    return Accelerator(
        kwargs_handlers=[group], deepspeed_plugin=plugin, gradient_accumulation_steps=accumulation(config, world)
    )


def _hush_stage_3() -> None:
    """DeepSpeed marks ranges for a profiler, and asks its rank to print nothing, more than a thousand times a step."""
    from deepspeed.runtime.zero import linear, parameter_offload, partition_parameters, partitioned_param_coordinator
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
    printed = partition_parameters.print_rank_0

    def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
        if debug or force:
            printed(message, debug, force)

    for module in (partition_parameters, parameter_offload, partitioned_param_coordinator):
        module.print_rank_0 = print_rank_0
    know_signature(linear.LinearFunctionForZeroStage3)


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Within it an import of this module fails at once, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _collectives(world: World) -> str:
    """What gradients are reduced by."""
    return "nccl" if world.device == "cuda" else "gloo"


def zero_config(config: RunConfig, world: World, trained: int) -> dict[str, Any]:
    """DeepSpeed's config for a model of so many trained parameters, every key of it that a run depends on."""
    bf16 = config.train.precision == "bf16"
    bucket = bucket_elements(config, trained)
    accumulated = accumulation(config, world)
    zero: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "overlap_comm": world.device == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "use_multi_rank_bucket_allreduce": True,  # else the host waits for the whole GPU before each reduction
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,  # even, and no more than that: it gathers all at once
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": LIVE_ELEMENTS,
        "stage3_param_persistence_threshold": 100_000,
        "sub_group_size": 1_000_000_000,
        # Keeps eager layers from saving the weights that were gathered. Compiled blocks save none, and with it torch
        # would compile every block anew; nor do selective ones, and it writes over what they keep.
        "memory_efficient_linear": not config.train.compile and config.train.gradient_checkpointing != "selective",
    }
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device == "cuda"}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulated,
        "train_batch_size": config.train.global_batch,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    result["communication_data_type"] = config.parallel.reduce_dtype
    if bf16 and accumulated > 1:
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
