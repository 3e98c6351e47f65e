"""This process's place among the ranks, and the environment that libraries want to find.

The only module (with vitscale/launch/) that touches `os.environ`. `enter()` is called by the
command line before torch, deepspeed or mlflow is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vitscale.errors import LaunchError
from vitscale.text import listed, to_stderr

_START = "start the processes with launch/torchrun.sh, launch/slurm.sh or torchrun"
_OF_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"),
)
_OF_MPI = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")  # which DeepSpeed holds against the ranks
_COUNTED = (
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)  # what srun, Open MPI and MPICH number their processes by
_OF_ACCELERATE = ("ACCELERATE_", "FSDP_")
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
    """The World that a launcher's variables tell (torchrun's, or Kubeflow's, which have no local ones), else a single
    process. LaunchError for variables that contradict each other."""
    if _is_single():
        return World(device=_device())
    has_local = "LOCAL_RANK" in os.environ and "LOCAL_WORLD_SIZE" in os.environ
    world = World(
        rank=_integer("RANK"),
        world_size=_integer("WORLD_SIZE"),
        local_rank=_integer("LOCAL_RANK") if has_local else 0,
        local_world_size=_integer("LOCAL_WORLD_SIZE") if has_local else 1,
        device=_device(),
        supervised=SUPERVISED in os.environ,
    )
    if not 0 <= world.rank < world.world_size or not 0 <= world.local_rank < world.local_world_size:
        raise LaunchError(
            f"RANK={world.rank} WORLD_SIZE={world.world_size} LOCAL_RANK={world.local_rank} "
            f"LOCAL_WORLD_SIZE={world.local_world_size}: a rank must lie below its world size; {_START}"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world.world_size > 1 and missing:
        raise LaunchError(
            f"{' and '.join(missing)}: not in the environment, though WORLD_SIZE={world.world_size}; {_START}"
        )
    return world


def enter() -> World:
    """Read the World and set what the libraries read at import; call before importing them.

    What an earlier launcher, or accelerate's own, left in the environment is taken away: it would change the run
    past its config, or make it wait for ranks that are not there.
    """
    world = read_world()
    leftovers = [name for name in os.environ if name.startswith(_OF_ACCELERATE)]
    if _is_single():
        leftovers += [name for name in os.environ if name in _OF_LAUNCHERS or name.startswith(_OF_MPI)]
    if world.device == "cpu" and os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        leftovers.append("DS_ACCELERATOR")
    if leftovers and world.is_main:
        values = listed((f"{name}={os.environ[name]}" for name in leftovers), limit=4)
        to_stderr(f"environment: {values}: left by another launcher, and ignored")
    for name in leftovers:
        del os.environ[name]
    if world.world_size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        # accelerate and deepspeed make a process group even for one process: with itself, at any free port.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in _defaults(world).items():
        os.environ.setdefault(name, value)
    return world


def _defaults(world: World) -> dict[str, str]:
    """What libraries find where the user has set nothing."""
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
    return defaults


def require_started_once() -> None:
    """LaunchError in each process but the first that srun or mpirun started beside each other, without ranks.

    Each of them would train the whole run for itself.
    """
    for number, count in _COUNTED if _is_single() else ():
        if os.environ.get(number, "0") not in ("", "0"):
            raise LaunchError(
                f"{number}={os.environ[number]} of {count}={os.environ.get(count)}: processes that were started beside "
                "each other without ranks do not train together; start one run by launch/slurm.sh (Slurm), or by "
                "launch/torchrun.sh or torchrun on each node"
            )


def _is_single() -> bool:
    """Whether this is no rank of a launcher, or was made a single process by `enter`."""
    return not os.environ.get("RANK") or not os.environ.get("WORLD_SIZE")


def child_environment() -> dict[str, str]:
    """The environment for a helper process that is no rank: without the launcher's variables."""
    return {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}


def forget_deepspeed() -> None:
    """Take away what accelerate's plugin left in the environment: the next Accelerator would be DeepSpeed's too."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def _integer(name: str) -> int:
    text = os.environ.get(name)
    if text is None or not text.lstrip("-").isdigit():
        raise LaunchError(f"{name}={text!r} in the environment must be a whole number; {_START}")
    return int(text)


def _device() -> str:
    """Whether this process is to use an NVIDIA GPU, told without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return "cuda" if not hidden and (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")) else "cpu"
