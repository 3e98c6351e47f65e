from __future__ import annotations

import contextlib
import io
import os
import pty

import pytest

from vitscale.tracking.progress import Progress, duration

ROW = {"step": 300, "loss": 0.123456, "lr": 1.5e-4, "images_per_second": 1024.0}
TEXT = "step 300/900  loss 0.1235  lr 1.50e-04  1,024 images/s  2m30s left"


def test_a_line_each_where_stderr_is_a_file():
    stream = io.StringIO()
    progress = Progress(900, 256, stream)
    progress.show(ROW)
    progress.show({"step": 900, "loss": "NaN", "lr": 0.0, "images_per_second": 1024.0})
    progress.say("saved")
    progress.close()
    assert stream.getvalue() == f"{TEXT}\nstep 900/900  loss nan  lr 0.00e+00  1,024 images/s  0s left\nsaved\n"


def test_rewritten_in_place_on_a_terminal():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        progress = Progress(900, 256, terminal)
        progress.show(ROW)
        progress.show({"step": 301})
        progress.say("saved")
        progress.show(ROW)
        progress.close()
    shown = b""
    with contextlib.suppress(OSError):  # a terminal that is closed at the other end has no end of file, but an error
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    second = "step 301/900  loss ?  lr ?  0 images/s  ? left"
    assert shown.decode() == f"\r{TEXT}\x1b[K\r{second}\x1b[K\r\nsaved\r\n\r{TEXT}\x1b[K\r\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (0.4, "0s"),
        (59.6, "1m00s"),
        (425, "7m05s"),
        (12_000, "3h20m"),
        (187_200, "2d04h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
