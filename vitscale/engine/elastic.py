"""`python -m vitscale.engine.elastic ARGUMENTS`: torchrun, whose exit code is that of the rank that failed first.

torchrun itself says 1 for every failure. Of a run that does not matter, since exit.json in its folder has the code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from vitscale.run_folder import DONE, FAILED, INTERRUPTED, STOPPED
from vitscale.text import to_stderr


def main(arguments: Sequence[str]) -> int:
    """Run the ranks to their end; the exit code."""
    try:
        run.main(list(arguments))
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else STOPPED  # below 0: ended by a signal, from outside
    except RendezvousError as error:  # the first node's torchrun has ended: it knows why
        to_stderr(f"torchrun: {error}")
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
