"""A real Slurm cluster of four nodes on this machine, for the tests: daemons, queue, signals, requeue.

Everything lives in one temporary folder with its own SLURM_CONF and ports of its own, bound to
127.0.0.1; /etc/hosts gets one line while it runs. Written for Slurm 22.05 and later, as root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

NODES = ("node1", "node2", "node3", "node4")
GPUS = 8
HOSTS = Path("/etc/hosts")
HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)}  # vitscale's test cluster\n"
MUNGE_PID = Path("/run/munge/munged.pid")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "munged", "munge")

CONF = """\
ClusterName=vitscale
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdTimeout=60
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20 OverSubscribe=NO
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 OverSubscribe=NO
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=20000 Gres=gpu:"
    f"{GPUS} State=UNKNOWN"
)


def what_is_missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root to start jobs"
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    return f"Slurm is not installed (no {', '.join(missing)})" if missing else None


class SlurmCluster:
    """Start it, submit to it, stop it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._began_munge = False

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment, pointed at the cluster."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**inherited, "SLURM_CONF": str(self.folder / "slurm.conf"), **more}

    def command(self, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            arguments, cwd=cwd, env=self.environment(**environment), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, environment: Mapping[str, str]) -> int:
        """sbatch; the job's number."""
        return int(self.command("sbatch", "--parsable", *arguments, cwd=cwd, **environment))

    def state(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.command("scontrol", "show", "job", "--oneliner", str(job))
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait_for(self, what: str, holds: Callable[[], bool], seconds: float, log: Path | None = None) -> None:
        """Wait until something holds, or fail with the job's log."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-6000:] if log and log.exists() else "no log"
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self.command('squeue', '--all')}\n{text}")
            time.sleep(0.2)

    def _start(self) -> None:
        host = socket.gethostname()
        ports = _free_ports(len(NODES) + 1)
        for name in NODES:
            (self.folder / "spool" / name).mkdir(parents=True)
        for name in ("state", "cgroup"):
            (self.folder / name).mkdir()
        gpus = [self.folder / f"fakegpu{number}" for number in range(GPUS)]
        for gpu in gpus:
            gpu.symlink_to("/dev/null")  # a character device is what Slurm asks for
        nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
        conf = CONF.format(host=host, port=ports[0], folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/cgroup\nCgroupAutomount=no\n"
        )
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[1-{len(NODES)}] Name=gpu File={self.folder}/fakegpu[0-{GPUS - 1}]\n"
        )
        if HOSTS_LINE not in HOSTS.read_text():
            with HOSTS.open("a") as stream:
                stream.write(HOSTS_LINE)
        self._start_munge()
        self.command("slurmctld")
        for name in NODES:
            self.command("slurmd", "-N", name)
        self.wait_for("all nodes idle", self._all_idle, 60, self.folder / "slurmctld.log")

    def _all_idle(self) -> bool:
        ask = ("sinfo", "-hN", "-p", "low", "-o", "%T")
        done = subprocess.run(ask, env=self.environment(), capture_output=True, text=True)
        return done.stdout.split() == ["idle"] * len(NODES)

    def _start_munge(self) -> None:
        if subprocess.run(("munge", "-n"), capture_output=True).returncode == 0:
            return
        MUNGE_PID.parent.mkdir(exist_ok=True)
        shutil.chown(MUNGE_PID.parent, "munge", "munge")
        subprocess.run(("su", "-s", "/bin/sh", "munge", "-c", "munged"), check=True, timeout=60)
        self._began_munge = True

    def _stop(self) -> None:
        if (self.folder / "slurmctld.pid").exists():
            cancel = ("scancel", "--user=root", "--full")
            subprocess.run(cancel, env=self.environment(), capture_output=True, timeout=60)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and self.command("squeue", "-h").strip():
                time.sleep(0.5)
        pid_files = [self.folder / f"{name}.pid" for name in (*NODES, "slurmctld")]
        _stop_daemons(pid_files + [MUNGE_PID] * self._began_munge)
        kept = [line for line in HOSTS.read_text().splitlines(keepends=True) if line != HOSTS_LINE]
        HOSTS.write_text("".join(kept))


def _stop_daemons(pid_files: Iterable[Path]) -> None:
    """End the daemons that wrote these files and wait until they are gone."""
    pids = {int(file.read_text()) for file in pid_files if file.exists()}
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        _kill(pids, number)
        deadline = time.monotonic() + seconds
        while pids and time.monotonic() < deadline:
            pids = _kill(pids, 0)
            time.sleep(0.05)


def _kill(pids: set[int], number: int) -> set[int]:
    """Send a signal; the processes that were there."""
    there = set()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            there.add(pid)
    return there


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports
