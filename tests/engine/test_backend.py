"""Backends one after the other in a process, as the GPU suite and `vitscale evaluate` make them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitscale.bench.gpu_suite.correctness import small_config
from vitscale.bench.gpu_suite.training import LR, Training, batch
from vitscale.config.schema import Parallel, RunConfig
from vitscale.config.step import LIVE_ELEMENTS
from vitscale.engine import backend
from vitscale.engine.backend import Backend, zero_config
from vitscale.engine.engine import Inputs
from vitscale.errors import ConfigError
from vitscale.models.auto import new_model
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.world import World

pytestmark = pytest.mark.usefixtures("single_rank")


def config(stage: int, objective: str = "multitask", **train: Any) -> RunConfig:
    small = small_config(objective)
    return replace(small, parallel=Parallel(zero_stage=stage), train=replace(small.train, **train))


def test_a_backend_leaves_nothing_to_the_next_one() -> None:
    """Of another stage: accelerate and DeepSpeed keep theirs in the process."""
    losses, linear = [], torch.nn.functional.linear
    for stage in (0, 3, 0, 2):
        with Training(config(stage), World()) as training:
            assert training.engine.stage == stage
            assert (type(training.engine.model).__name__ == "DeepSpeedEngine") == (stage > 0)
            losses.append(training.steps(0, 2))
        assert not torch.distributed.is_initialized()
        assert torch.nn.functional.linear is linear
        assert not [name for name in os.environ if name.startswith("ACCELERATE_")]
    assert losses == [pytest.approx(losses[0], rel=1e-6)] * 4


def test_what_is_not_needed_is_not_imported() -> None:
    """In a process of its own: each of them costs seconds of every start."""
    code = "import sys, torch; from tests.engine.test_backend import config; from vitscale.world import World; " \
           "from vitscale.bench.gpu_suite.training import Training; training = Training(config(2), World()); " \
           "training.__enter__(); assert 'deepspeed' in sys.modules; " \
           "print(*{'mlflow', 'torch._inductor.compile_fx', 'transformers'} & set(sys.modules))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "", done.stdout


def test_deterministic_algorithms_are_the_configs() -> None:
    for asked in (True, False):
        with Training(config(0, deterministic=asked), World()):
            assert torch.are_deterministic_algorithms_enabled() == asked
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("stage", [0, 2])
def test_no_micro_batch_is_kept_while_the_next_one_is_prepared(stage: int) -> None:
    alive: list[int] = []
    with Training(config(stage, micro_batch=4), World()) as training:

        def micro_batches() -> Iterator[Inputs]:
            for number in range(training.engine.accumulation):
                inputs = batch(training.config, number, training.backend.device)
                tensors = [weakref.ref(tensor) for tensor in inputs.values()]
                yield inputs
                del inputs
                alive.append(sum(tensor() is not None for tensor in tensors))

        training.engine.step(micro_batches(), LR)
    assert alive == [0, 0]


@pytest.mark.parametrize("stage", [0, 2])
def test_loss_and_metrics_of_a_step_are_means_over_its_micro_batches(stage: int) -> None:
    outputs: list[Any] = []
    with Training(config(stage, micro_batch=4), World()) as training:
        training.engine.module.register_forward_hook(lambda module, given, output: outputs.append(output))
        inputs = [batch(training.config, number, training.backend.device) for number in (0, 1)]
        result = training.engine.step(inputs, LR)
    one, other = outputs
    assert result.loss == pytest.approx(float(one.loss + other.loss) / 2)
    assert result.metrics == pytest.approx(
        {name: float(one.metrics[name] + other.metrics[name]) / 2 for name in one.metrics}
    )
    assert len(result.metrics) > 1


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_blocks_compile_whole(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for the encoder's blocks, one for the decoder's, one for the loss: DDP's buckets and ZeRO-3's hooks cut
    none."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_blocks = ViTPreTrainedModel.compile_blocks
    monkeypatch.setattr(ViTPreTrainedModel, "compile_blocks", lambda model: compile_blocks(model, backend=keep))
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    torch.compiler.reset()
    losses = []
    for compiled in (False, True):
        with Training(config(stage, "mae", compile=compiled), World()) as training:
            losses.append(training.steps(0, 2))
    assert len(graphs) == 3
    assert losses[0] == losses[1]


class _Attentions(TorchDispatchMode):
    """The types that attention's kernel, and its backward, are run in."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func.__name__:
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_cpu_attends_in_fp32_beside_bf16(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the kernel's backward takes 1.4 to 6 times as long in bf16; the losses stay near those in bf16."""
    losses = {}
    for kind in (torch.float32, torch.bfloat16):
        if kind == torch.bfloat16:
            monkeypatch.setattr(backend, "attend_in_float32", lambda model: None)
        with Training(config(stage, precision="bf16"), World()) as training, _Attentions() as attentions:
            losses[kind] = training.steps(0, 2)
        assert set(attentions.types) == {kind}
    assert losses[torch.float32] == pytest.approx(losses[torch.bfloat16], rel=0.01)
    assert losses[torch.float32] != losses[torch.bfloat16]


def test_without_a_compiler_compiling_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = config(0, compile=True)
    backend = Backend(compiled, World())
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(ConfigError, match=r"train\.compile=true: torch.compile needs a C compiler"):
            backend.wrap(new_model(compiled, 0), compiled)
    finally:
        backend.close()


def test_a_start_without_tracking_does_not_import_mlflow() -> None:
    """DeepSpeed's autotuner would, where it is installed; afterwards it can be imported as ever."""
    program = (
        "import sys; from vitscale import world; from vitscale.engine.backend import Backend; "
        "from vitscale.config.schema import Parallel, RunConfig; "
        "Backend(RunConfig(parallel=Parallel(zero_stage=1)), world.enter()); "
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules; import mlflow"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("labels", [9, 10])
def test_a_bucket_holds_what_is_trained_and_no_more(labels: int) -> None:
    """An odd number too, though DeepSpeed wants an even one where it gathers."""
    of_run = config(1)
    of_run = replace(of_run, model=replace(of_run.model, num_labels=labels))
    with Training(of_run, World()) as training:
        trained = training.engine.module.num_parameters(only_trainable=True)
        assert training.engine.optimizer.reduce_bucket_size == trained
        assert math.isfinite(training.steps(0, 1)[0])


def test_the_plan_and_the_engine_agree_on_what_stays_gathered() -> None:
    zero = zero_config(config(3), World(), 40_001)["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == LIVE_ELEMENTS
