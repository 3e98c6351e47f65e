"""A process that saves checkpoints, for tests that end or starve it: python saver.py ROOT STEP KEEP [POINT|limit=BYTES].

Two ranks as threads. With POINT it kills itself by SIGKILL when the save of STEP gets there.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from conftest import run_ranks  # noqa: E402
from test_store import save  # noqa: E402

from vitscale.checkpoint import store  # noqa: E402


def main(root: str, step: str, keep: str, fault: str = "") -> None:
    if fault.startswith("limit="):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.removeprefix("limit=")),) * 2)
    elif fault:
        store.on_progress = lambda point: os.kill(os.getpid(), signal.SIGKILL) if point == fault else None
    for outcome in run_ranks(2, lambda ranks: save(Path(root), int(step), int(keep), ranks=ranks)):
        print(outcome)


if __name__ == "__main__":
    main(*sys.argv[1:])
