"""A process that saves a checkpoint, for tests that end or starve it.

python -m tests.checkpoint.saver ROOT STEP KEEP [POINT | limit=BYTES]: two ranks as threads. With POINT it kills
itself by SIGKILL when the save gets there; with a limit no file may grow beyond it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

from tests.checkpoint.ranks import run_ranks
from tests.checkpoint.test_store import save
from vitscale.checkpoint import store


def main(root: str, step: str, keep: str, fault: str = "") -> None:
    if fault.startswith("limit="):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.removeprefix("limit=")),) * 2)
    elif fault:
        store.on_progress = lambda point: os.kill(os.getpid(), signal.SIGKILL) if point == fault else None
    for outcome in run_ranks(2, lambda ranks: save(Path(root), int(step), int(keep), ranks=ranks)):
        print(outcome)


if __name__ == "__main__":
    main(*sys.argv[1:])
