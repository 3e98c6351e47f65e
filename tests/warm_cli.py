"""`vitscale` for shell blocks in a fraction of a second: a process imports the libraries once and forks every command.

`python -m tests.warm_cli SOCKET` serves; `warm_commands` starts it and makes a program `vitscale` that hands its
arguments, folder and streams to it. Each command is a real process with real pipes and exit codes; only the imports
(2 to 8 s of CPU a command) are shared.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.forked import be_command
from tests.torchvision_ops import DeclareOperators

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("torch", "sklearn", "transformers", "timm", "matplotlib.figure", "onnxscript", "onnxruntime.quantization")
_CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps({{"argv": sys.argv[1:], "folder": os.getcwd()}})
    socket.send_fds(server, [request.encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or b"1"))
"""


@contextlib.contextmanager
def warm_commands(folder: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """Start the server; what comes is a function that waits for it and gives an environment with `vitscale`.

    folder: an empty one of a short path, for the program and the socket.
    """
    program, path = folder / "vitscale", folder / "socket"
    program.write_text(_CLIENT.format(python=sys.executable, path=str(path)), encoding="utf-8")
    program.chmod(0o755)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.warm_cli", str(path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as server:

        def ready() -> dict[str, str]:
            while not path.exists():
                assert server.poll() is None, f"{' '.join(command)} has ended with {server.returncode}"
                time.sleep(0.05)
            return {**environment, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

        try:
            yield ready
        finally:
            server.kill()


def serve(path: str) -> None:
    """Import, listen, and fork a process a command until killed, or until who started this is gone."""
    parent = os.getppid()
    sys.meta_path.insert(0, DeclareOperators())
    for module in IMPORTED:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        os.rename(f"{path}.new", path)  # there once it answers
        listener.settimeout(5)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError), listener.accept()[0] as client:
                request, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
                pid = os.fork()
                if pid == 0:
                    _run(json.loads(request), streams)
                for stream in streams:
                    os.close(stream)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                client.sendall(str(code if code >= 0 else 128 - code).encode())


def _run(request: dict, streams: list[int]) -> None:
    """Be the command; never returns."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    os.chdir(request["folder"])
    be_command(request["argv"])


if __name__ == "__main__":
    serve(sys.argv[1])
