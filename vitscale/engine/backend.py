"""accelerate's DDP (stage 0) or DeepSpeed's ZeRO (stages 1 to 3) behind one small class.

The only importer of accelerate and deepspeed. Every key that matters is written here: "auto" values
and library defaults differ between versions, and some of them silently train something else.
"""

from __future__ import annotations

import resource
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from vitscale.checkpoint.fragments import Piece
from vitscale.checkpoint.store import Checkpoint
from vitscale.config.check import accumulation
from vitscale.config.schema import RunConfig
from vitscale.engine import zero_state
from vitscale.engine.optim import fill_state, make_optimizer
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import LaunchError
from vitscale.world import World, forget_deepspeed

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, on this rank."""

    loss: float  # mean over this rank's samples
    metrics: dict[str, float]
    grad_norm: float  # of the global gradient before clipping; inf or nan where it was not finite
    applied: bool  # False: the gradient was not finite and the weights are as before


class Backend:
    """The process group and, after `wrap`, the engine that trains."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.world = world
        self.accelerator = _make_accelerator(config, world)
        self.ranks = ProcessRanks(timedelta(seconds=config.parallel.timeout_s))
        seen = (self.accelerator.process_index, self.accelerator.num_processes, self.ranks.world_size)
        if seen != (world.rank, world.world_size, world.world_size):
            raise LaunchError(
                f"accelerate sees rank {seen[0]} of {seen[1]} (process group of {seen[2]}), the launcher gave rank "
                f"{world.rank} of {world.world_size}: ranks would train apart; start with launch/torchrun.sh"
            )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def wrap(self, model: nn.Module, config: RunConfig) -> Engine:
        """Shard and compile `model` (initialized, on the CPU, equal on all ranks) for training."""
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        if config.train.compile:
            for block in model.blocks():  # type: ignore[operator]
                block.compile(dynamic=False)  # encoder and decoder have each one length, not one dynamic one
        model.train()
        torch.use_deterministic_algorithms(config.train.deterministic)
        if self.device.type == "cuda":
            # fp32 is fp32; beside bf16, what is still multiplied in fp32 (the resize) may use TF32.
            torch.backends.cudnn.allow_tf32 = config.train.precision == "bf16"
            torch.set_float32_matmul_precision("high" if config.train.precision == "bf16" else "highest")
        engine = DDPEngine if config.parallel.zero_stage == 0 else ZeroEngine
        return engine(self.accelerator, model, config, self.world, self.ranks)

    def close(self) -> None:
        """Leave the process group, and what accelerate and DeepSpeed keep of it: another Backend may follow."""
        import deepspeed
        from accelerate.state import AcceleratorState, GradientState

        if deepspeed.comm.is_initialized():  # first: it keeps groups of its own, which accelerate does not know
            deepspeed.comm.destroy_process_group()
        self.accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # Both are process-wide: the next Accelerator would believe in this one's stage and process group.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        forget_deepspeed()


class Engine:
    """A model under training: takes steps, gives its state as pieces and takes it back."""

    stage: int
    model: nn.Module  # as wrapped
    optimizer: Any  # torch's at stage 0, DeepSpeed's ZeRO optimizer above

    def __init__(
        self, accelerator: Any, model: nn.Module, config: RunConfig, world: World, ranks: ProcessRanks
    ) -> None:
        self.accelerator = accelerator
        self.module = model
        self.config = config
        self.ranks = ranks
        self.stage = config.parallel.zero_stage
        self.accumulation = accumulation(config, world)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert not frozen, f"frozen parameters are not checkpointed yet: {frozen}"
        # The fused step reads its state on the GPU.
        self.fused = accelerator.device.type == "cuda" and not config.parallel.offload_optimizer
        optimizer = make_optimizer(model, config.optimizer, self.fused)
        self._wrap(optimizer)
        self.fragments = zero_state.fragments(model, self.optimizer, self.stage, ranks.rank)
        self.inner = zero_state.inner_optimizer(self.optimizer, self.stage)
        fill_state(self.inner, zero_state.flats(self.optimizer, self.stage), self.fused)

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        raise NotImplementedError

    def step(self, micro_batches: Iterable[Inputs], lr: float) -> StepResult:
        """One optimizer step over `accumulation` micro-batches (pulled one at a time)."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        metric_sums: dict[str, torch.Tensor] = {}
        for number, inputs in enumerate(micro_batches):
            output = self._forward_backward(inputs, last=number == self.accumulation - 1)
            loss_sum += output.loss.detach()
            for name, value in output.metrics.items():
                metric_sums[name] = metric_sums.get(name, 0.0) + value.detach().double()
        norm, applied = self._update()
        metrics = {name: float(value) / self.accumulation for name, value in metric_sums.items()}
        return StepResult(float(loss_sum) / self.accumulation, metrics, norm, applied)

    def warm_up(self, inputs: Inputs) -> None:
        """What the wrapper does differently in its first iteration, done and dropped."""

    def _forward_backward(self, inputs: Inputs, last: bool) -> Any:
        raise NotImplementedError

    def _update(self) -> tuple[float, bool]:
        """Apply the gradients: (their norm before clipping, whether they were applied)."""
        raise NotImplementedError

    @property
    def adam_step(self) -> int:
        """Optimizer steps that were applied."""
        return max((int(state["step"]) for state in self.inner.state.values()), default=0)

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of a checkpoint, on the CPU."""
        for fragment in self._written():
            yield _piece("param", fragment, fragment.weights())
            for kind in zero_state.MOMENTS:
                yield _piece(kind, fragment, fragment.moment(self.inner, kind))
        if self.ranks.rank == 0:
            for name, buffer in saved_buffers(self.module).items():
                yield Piece("buffer", name, tuple(buffer.shape), 0, buffer.detach().reshape(-1).cpu().numpy())

    def _written(self) -> list[zero_state.Fragment]:
        """The fragments that this rank writes: all it owns, or at stage 0 its share of what all own."""
        if self.stage > 0:
            return self.fragments
        total, seen, mine = sum(fragment.count for fragment in self.fragments), 0, []
        for fragment in self.fragments:
            if seen * self.ranks.world_size // total == self.ranks.rank:
                mine.append(fragment)
            seen += fragment.count
        return mine

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take master weights and Adam's state from a checkpoint of any stage and world.

        `load_weights` must have put the weights into the module before it was wrapped: at bf16 the
        low-precision copies are made from them.
        """
        for fragment in self.fragments:
            targets = {"param": fragment.weights()}
            targets |= {kind: fragment.moment(self.inner, kind) for kind in zero_state.MOMENTS}
            for kind, target in targets.items():
                values = checkpoint.read(kind, fragment.name, fragment.start, fragment.count)
                target.copy_(torch.from_numpy(values))
        for state in self.inner.state.values():
            state["step"].fill_(checkpoint.state["adam_step"])


class DDPEngine(Engine):
    """Stage 0: every rank holds everything; bf16 is autocast over fp32 weights."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.model = self.accelerator.prepare(self.module)

    def _forward_backward(self, inputs: Inputs, last: bool) -> Any:
        with self._reduced_at(last):
            output = self.model(**inputs)
            (output.loss / self.accumulation).backward()
        return output

    def _reduced_at(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def warm_up(self, inputs: Inputs) -> None:
        # DDP rebuilds its buckets after the first backward, and with other buckets gradients differ
        # in their last bits; a resumed run must not have a first iteration of its own.
        if self.ranks.world_size > 1:
            self.model(**inputs).loss.backward()
            self.optimizer.zero_grad()

    def _update(self) -> tuple[float, bool]:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = bool(torch.isfinite(norm))
        if applied:
            if self.config.optimizer.clip > 0:
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.clip, norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm), applied


class ZeroEngine(Engine):
    """Stages 1 to 3: DeepSpeed's engine; bf16 weights over fp32 masters."""

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        bf16 = self.config.train.precision == "bf16"
        # DeepSpeed makes its masters from the module's bf16 copies, which would round the weights.
        exact = {name: p.detach().clone() for name, p in self.module.named_parameters()} if bf16 else {}
        self.engine, wrapped = self.accelerator.prepare(self.module, optimizer)
        self.model, self.optimizer = self.engine, wrapped.optimizer
        if exact:
            for fragment in zero_state.fragments(self.module, self.optimizer, self.stage, self.ranks.rank):
                values = exact[fragment.name].view(-1)[fragment.start : fragment.start + fragment.count]
                fragment.weights().copy_(values)

    def _forward_backward(self, inputs: Inputs, last: bool) -> Any:
        # Pixels stay fp32: the model casts them where they meet its weights, and its targets stay exact.
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        output = self.engine(**inputs)
        self.engine.backward(output.loss)  # divides by the accumulation steps of its config
        return output

    def _update(self) -> tuple[float, bool]:
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of GPU memory by tensors, or on a CPU of RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights and buffers into the plain module; names and shapes must agree."""
    parameters = dict(module.named_parameters())
    checkpoint.require("param", {name: tuple(p.shape) for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(checkpoint.whole("param", name)))
        for name, buffer in saved_buffers(module).items():
            buffer.copy_(torch.from_numpy(checkpoint.whole("buffer", name)))


def saved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state (fixed tables are recomputed instead)."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _piece(kind: str, fragment: zero_state.Fragment, values: torch.Tensor) -> Piece:
    return Piece(kind, fragment.name, fragment.shape, fragment.start, values.float().cpu().numpy())


def _make_accelerator(config: RunConfig, world: World) -> Any:
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # accelerate and DeepSpeed still use names that torch has newer ones for.
    for module in ("torch.distributed", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    timeout = timedelta(seconds=config.parallel.timeout_s)
    group = InitProcessGroupKwargs(backend="nccl" if world.device == "cuda" else "gloo", timeout=timeout)
    if config.parallel.zero_stage == 0:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        precision = "bf16" if config.train.precision == "bf16" else "no"
        return Accelerator(cpu=world.device == "cpu", mixed_precision=precision, kwargs_handlers=[group, ddp])
    # A C++ op for CPU collectives that would be compiled at the first start; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(hf_ds_config=zero_config(config, world), zero3_init_flag=False)
    # With cpu=True accelerate would silently give DDP instead.
    return Accelerator(
        kwargs_handlers=[group], deepspeed_plugin=plugin, gradient_accumulation_steps=accumulation(config, world)
    )


def zero_config(config: RunConfig, world: World) -> dict[str, Any]:
    """DeepSpeed's config, every key of it that a run depends on."""
    bf16 = config.train.precision == "bf16"
    bucket = config.parallel.bucket_elements
    accumulated = accumulation(config, world)
    zero: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "overlap_comm": world.device == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 100_000,
        "sub_group_size": 1_000_000_000,
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
    if bf16:
        result["communication_data_type"] = "fp32"  # gradients are summed over ranks as stage 0 sums them
    if bf16 and accumulated > 1:
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
