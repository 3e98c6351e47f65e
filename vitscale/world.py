"""This process's place among the ranks, and the environment that libraries want to find.

The only module (with vitscale/launch/) that touches `os.environ`. `enter()` is called by the
command line before torch, deepspeed or mlflow is imported.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitscale.errors import LaunchError
from vitscale.faults import arm
from vitscale.heartbeat import start as start_heartbeat
from vitscale.text import hide, listed, redact, secrets_of, to_stderr

_START = "start the processes with launch/torchrun.sh, launch/slurm.sh or torchrun"
_OF_LAUNCHERS = re.compile(r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
# What would change a run past its config, or contradict its ranks: accelerate's, and MPI's, by which DeepSpeed checks.
_NEVER_READ = ("ACCELERATE_", "FSDP_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_")
# Network interfaces that ranks are to meet by: of a cluster's compute nodes, and perhaps not of this one.
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
# How srun, Open MPI, MPICH, MVAPICH, PMIx, Cray's launchers, Flux and jsrun number the processes that they start.
_NUMBERS = (
    *("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK", "PALS_RANKID"),
    *("ALPS_APP_PE", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK"),
)
_PERIOD = "cpu.cfs_period_us"
_allowed: int | None = None  # cores that this process could use before it was pinned to some of them
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what stops a run
FAULT = "VITSCALE_FAULT"  # see faults.py
ATTEMPT = "VITSCALE_ATTEMPT"  # set by launch/torchrun.py for its ranks: which start of the run this is
RESOLVER = "timeout:1 attempts:4"  # see resolv.conf(5): 1, 2, 4 and 8 s for one server
HEARTBEAT = "VITSCALE_HEARTBEAT"  # the folder of heartbeats of this node's ranks, likewise


@dataclass(frozen=True)
class World:
    """Where this process stands: ranks as torchrun counts them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: str = "cpu"  # "cpu" or "cuda"
    supervised: bool = False  # by our launcher, which reads exit.json instead of the ranks' exit codes
    job: str | None = None  # Slurm's number of it, for messages
    attempt: str = field(default="", compare=False)  # which start of the run; without a launcher each process makes one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores_per_rank(self) -> int:
        """CPU cores this rank may use without taking its neighbours'."""
        return max(1, _cores() // self.local_world_size)


def _cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its control group (a container's)."""
    quota = _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.ceil(min(_allowed or len(os.sched_getaffinity(0)), quota)))


def pin(cores: Sequence[int]) -> None:
    """Let this process run on these cores alone: all threads that it has, and what they start from now on.

    `cores_per_rank` stays what it was.
    """
    global _allowed
    _allowed = _allowed or len(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


def binds_threads() -> bool:
    """Whether the environment says on which cores OpenMP's threads are to run."""
    bound = os.environ.get("OMP_PROC_BIND", "false").lower() != "false"
    return bound or any(name in os.environ for name in ("OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"))


def _quota(own: Path, mounted: Path) -> float:
    """The least number of cores that a control group of this process, or one above it, may use; infinite: no limit.

    own: /proc/self/cgroup; mounted: where control groups are, of version 2, or of version 1 below `cpu`.
    """
    quotas = [math.inf]
    for folder, newer in control_groups(own, mounted, "cpu"):
        names = ["cpu.max"] if newer else ["cpu.cfs_quota_us", _PERIOD]
        with contextlib.suppress(OSError, ValueError):  # not there, or without a limit ("max")
            limit, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if int(limit) > 0:
                quotas.append(int(limit) / int(period))
    return min(quotas)


def control_groups(own: Path, mounted: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control groups and of those above them, by a controller (cpu, memory), and whether
    they are of version 2. own and mounted: as in _quota."""
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mounted / controller if controllers else mounted
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, not controllers
            if folder == root:
                break


def read_world() -> World:
    """The World that a launcher's variables tell: torchrun's, or Kubeflow's, which have no local ones; without them a
    single process. LaunchError for variables that contradict each other."""
    own = f"{socket.gethostname()}.{os.getpid()}.{time.time():.0f}"
    single = World(
        device=local_device(),
        supervised=ATTEMPT in os.environ,
        job=os.environ.get("SLURM_JOB_ID"),
        attempt=os.environ.get(ATTEMPT, own),
    )
    if not os.environ.get("RANK") or not os.environ.get("WORLD_SIZE"):
        return single
    rank, world_size = _integer("RANK"), _integer("WORLD_SIZE")
    if (rank, world_size) == (0, 1):
        return single
    local_rank, local_world_size = _place_on_node()
    if not 0 <= rank < world_size or not 0 <= local_rank < local_world_size:
        raise LaunchError(
            f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_world_size}: "
            f"a rank must lie below its world size; {_START}"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LaunchError(f"{' and '.join(missing)}: not in the environment, though WORLD_SIZE={world_size}; {_START}")
    if not 0 < _integer("MASTER_PORT") < 2**16:
        raise LaunchError(f"MASTER_PORT={os.environ['MASTER_PORT']} in the environment: must be 1 to 65535; {_START}")
    return replace(single, rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)


def enter(on_ranks: bool = False) -> World:
    """Read the World and set what the libraries read at import; call before importing them.

    on_ranks: whether this may be a rank among others; else, and where no launcher says so, it is a single process.
    What other launchers left in the environment is named and taken away: it would change the run past its config, or
    make it wait for ranks that are not there. LaunchError as in read_world, and in each process but the first that
    were started beside each other without ranks.
    """
    hide_secrets()
    world = read_world() if on_ranks else World(device=local_device())
    if on_ranks and world.world_size == 1:
        _require_first()
    told = {"LOCAL_RANK": str(world.local_rank), "LOCAL_WORLD_SIZE": str(world.local_world_size)}
    if world.world_size == 1:
        # accelerate and deepspeed make a process group even for one process: with itself, at any free port.
        told |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    left = [
        name
        for name in os.environ
        if name.startswith(_NEVER_READ)
        or (world.world_size == 1 and name in _INTERFACES)
        or (world.world_size == 1 and _OF_LAUNCHERS.fullmatch(name) and os.environ[name] != told.get(name))
    ]
    if world.device == "cpu" and os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        left.append("DS_ACCELERATOR")
    if left and world.is_main:
        values = listed((f"{name}={os.environ[name]}" for name in left), limit=4)
        to_stderr(f"environment: {redact(values)}: set for another launcher, and ignored")
    for name in left:
        del os.environ[name]
    os.environ |= told
    if FAULT in os.environ:
        arm(os.environ[FAULT], world.rank)
    if on_ranks:
        start_heartbeat(os.environ.get(HEARTBEAT), world.rank)
    _settle_threads(world)
    os.environ["MPLBACKEND"] = "agg"  # Jupyter leaves its own to what it starts
    for name, value in _defaults(world).items():
        os.environ.setdefault(name, value)
    open_files_limit(raised=True)
    return world


def hide_secrets() -> None:
    """Let no message repeat what the environment calls a secret."""
    hide(secrets_of(os.environ))


def open_files_limit(raised: bool = False) -> int:
    """How many files this process may have open; raised: make it the most that the system allows, if it does.

    Rank 0 has a connection to every rank, and a reader many shards open; 1,024 is the usual limit of a shell.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if raised and soft != hard:
        with contextlib.suppress(ValueError, OSError):  # `vitscale doctor` tells the limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def host() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()


def _settle_threads(world: World) -> None:
    """OpenMP takes a number a level of nesting ("2,1") or none; what accelerate reads must be one number."""
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None or (text.isdecimal() and int(text) > 0):
        return
    first = text.partition(",")[0].strip()
    threads = first if first.isdecimal() and int(first) > 0 else str(world.cores_per_rank)
    if world.is_main:
        to_stderr(f"environment: OMP_NUM_THREADS={text}: must be a whole number above 0; {threads} is taken")
    os.environ["OMP_NUM_THREADS"] = threads


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
        # What train.deterministic needs of cuBLAS before its first call; of Hopper's workspace it is the default size.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": str(world.cores_per_rank),
        # gloo connects two ranks when they first talk: a mesh of 1,000 ranks would be a million connections.
        "TORCH_GLOO_LAZY_INIT": "1",
        # torch asks for the name of each connection's address; a name server that hundreds of ranks ask at once
        # leaves some unanswered, and by default libc would ask again after 5 s. In all it waits as long as by default.
        "RES_OPTIONS": RESOLVER,
        # Every rank would start a compiling process for each core of the node, up to 32.
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(32, world.cores_per_rank)),
    }
    if world.device == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
        # Idle threads that spin take the cores from the reader's: the resize cost up to 4 times as much.
        defaults["OMP_WAIT_POLICY"] = "PASSIVE"
        # A batch's memory comes new from the kernel: in pages of 4 kB their faults are a fifth of the resize's time.
        defaults["THP_MEM_ALLOC_ENABLE"] = "1"
    return defaults


def _require_first() -> None:
    """LaunchError in each process but the first that srun or mpirun started beside each other, without ranks.

    Each of them would train the whole run for itself.
    """
    for name in _NUMBERS:
        if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 0:
            raise LaunchError(
                f"{name}={os.environ[name]}: processes that were started beside each other without ranks do not train "
                "together; start one run by launch/slurm.sh (Slurm), or by launch/torchrun.sh or torchrun on each node"
            )


def child_environment() -> dict[str, str]:
    """The environment for a helper process that is no rank: without the launcher's variables."""
    return {name: value for name, value in os.environ.items() if not _OF_LAUNCHERS.fullmatch(name)}


def start_helper(
    module: str,
    arguments: Sequence[str],
    descriptors: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start `python -m module` beside this process, from the same code: exec'ed, not forked, so that neither NCCL nor
    CUDA is carried into it. It is to call `ignore_stops` first.

    descriptors: what it is handed, under the same numbers; environment: what it has beside that of child_environment.
    """
    variables = child_environment() | dict(environment or {})
    root = Path(__file__).parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # run from a checkout: the same code for the helper
        variables["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [variables.get("PYTHONPATH")])])
    # A signal to the whole group must not end the helper before it has learnt to ignore it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        # -P: not whatever lies in the folder where the run was started under the name of a module.
        command = [sys.executable, "-P", "-m", module, *arguments]
        return subprocess.Popen(command, pass_fds=descriptors, env=variables, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stops() -> None:
    """In a helper process: ignore the signals that stop a run, since the ranks save and leave in their own time."""
    for ignored in _STOPS:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)  # the parent blocked them until now


def forget_deepspeed() -> None:
    """Take away what accelerate's plugin left in the environment: the next Accelerator would be DeepSpeed's too."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def meeting_place() -> str:
    """Where this rank meets the others, for messages."""
    return f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"


def meeting_store() -> tuple[str, int, bool]:
    """(host, port, whether rank 0 is to open it) of the store that ranks meet at: torchrun opens one of its own."""
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), own


def network_interface() -> str | None:
    """The one that the environment has gloo's ranks meet by."""
    return os.environ.get("GLOO_SOCKET_IFNAME")


def _place_on_node() -> tuple[int, int]:
    """LOCAL_RANK and LOCAL_WORLD_SIZE; alone on the node where neither is there."""
    if "LOCAL_RANK" not in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return 0, 1
    count = next((name for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE") if name in os.environ), None)
    if count is None:
        raise LaunchError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']}: needs LOCAL_WORLD_SIZE, the processes on this node; export it, or "
            f"{_START}"
        )
    return _integer("LOCAL_RANK"), _integer(count)


def _integer(name: str) -> int:
    text = os.environ.get(name)
    if text is None or not text.removeprefix("-").isdecimal():
        raise LaunchError(f"{name}={text!r} in the environment must be a whole number; {_START}")
    return int(text)


def local_device() -> str:
    """Whether this process is to use an NVIDIA GPU, told without importing torch: "cuda" or "cpu"."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return "cuda" if not hidden and (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")) else "cpu"
