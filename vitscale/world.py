"""This process's place among the ranks, and the environment that libraries want to find.

The only module (with vitscale/launch/) that touches `os.environ`. `enter()` is called by the
command line before torch, deepspeed or mlflow is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vitscale.errors import LaunchError

SUPERVISED = "VITSCALE_SUPERVISED"  # set by launch/torchrun.py for its ranks


@dataclass(frozen=True)
class World:
    """Where this process stands: ranks as torchrun counts them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: str = "cpu"  # "cpu" or "cuda"
    supervised: bool = False  # by our launcher, which reads exit.json instead of the ranks' exit codes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores_per_rank(self) -> int:
        """CPU cores this rank may use without taking its neighbours'."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


def read_world() -> World:
    """The World that the launcher's variables tell: torchrun's, else a single process."""
    if "RANK" not in os.environ:
        return World(device=_device())
    world = World(
        rank=_integer("RANK"),
        world_size=_integer("WORLD_SIZE"),
        local_rank=_integer("LOCAL_RANK"),
        local_world_size=_integer("LOCAL_WORLD_SIZE"),
        device=_device(),
        supervised=SUPERVISED in os.environ,
    )
    if not 0 <= world.rank < world.world_size or not 0 <= world.local_rank < world.local_world_size:
        raise LaunchError(
            f"RANK={world.rank} WORLD_SIZE={world.world_size} LOCAL_RANK={world.local_rank} "
            f"LOCAL_WORLD_SIZE={world.local_world_size}: a rank must lie below its world size; "
            "start the processes with launch/torchrun.sh or launch/slurm.sh"
        )
    return world


def enter() -> World:
    """Read the World and set what the libraries read at import; call before importing them."""
    world = read_world()
    defaults = {
        # A dead MLflow server answers at once or not at all; our own thread does the retrying.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Where a run is would be printed with the URI's user and password.
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        # DeepSpeed speaks at INFO on every rank; what matters of it we say ourselves.
        "DEEPSPEED_LOG_LEVEL": "warning",
        "MPLBACKEND": "agg",
        # What train.deterministic needs of cuBLAS before its first call; of Hopper's workspace it is the default size.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": str(world.cores_per_rank),
        # Every rank would start a compiling process for each core of the node, up to 32.
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(32, world.cores_per_rank)),
    }
    if world.device == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
        # Idle threads that spin take the cores from the reader's: the resize cost up to 4 times as much.
        defaults["OMP_WAIT_POLICY"] = "PASSIVE"
    if world.world_size == 1:
        # accelerate and deepspeed make a process group even for one process.
        defaults |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        defaults |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    return world


def child_environment() -> dict[str, str]:
    """The environment for a helper process that is no rank: without the launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launcher}


def forget_deepspeed() -> None:
    """Take away what accelerate's plugin left in the environment: the next Accelerator would be DeepSpeed's too."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def _integer(name: str) -> int:
    text = os.environ.get(name)
    if text is None or not text.lstrip("-").isdigit():
        raise LaunchError(
            f"{name}={text!r} in the environment must be a whole number; "
            "start the processes with launch/torchrun.sh or launch/slurm.sh"
        )
    return int(text)


def _device() -> str:
    """Whether this process is to use an NVIDIA GPU, told without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return "cuda" if not hidden and (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")) else "cpu"
