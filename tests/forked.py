"""What a forked process does, ending without its parent's way out."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn


def be_command(argv: Sequence[str]) -> NoReturn:
    """Run `vitscale ARGV` in this process and end with its exit code."""
    # As a new process has them: those inherited were made for other files, which may have had a position.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115

    def command() -> int:
        from vitscale.cli import main

        return main(argv)

    be(command)


def be(work: Callable[[], int]) -> NoReturn:
    """Do `work` in this process and end with the exit code that it returns, or 1 where it raises."""
    code = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
