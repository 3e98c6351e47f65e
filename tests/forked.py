"""A forked process that becomes a command."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn


def be_command(argv: Sequence[str]) -> NoReturn:
    """Run `vitscale ARGV` in this process and end with its exit code, without the parent's way out."""
    code = 1
    try:
        from vitscale.cli import main

        code = main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
