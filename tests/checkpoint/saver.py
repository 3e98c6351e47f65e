"""A process that saves a checkpoint, for tests that end it.

python -m tests.checkpoint.saver ROOT STEP KEEP POINT: two ranks as threads. It kills itself by SIGKILL when the save
gets to POINT.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.checkpoint.ranks import run_ranks
from tests.checkpoint.test_store import save
from vitscale import faults


def main(root: str, step: str, keep: str, last: str) -> None:
    faults.at_point = lambda point, _: os.kill(os.getpid(), signal.SIGKILL) if point == last else None
    run_ranks(2, lambda ranks: save(Path(root), int(step), int(keep), ranks=ranks))


if __name__ == "__main__":
    main(*sys.argv[1:])
