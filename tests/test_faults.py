"""Named points at which a run can be made to fail."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vitscale
from vitscale.errors import LaunchError
from vitscale.faults import POINTS, arm, fault_point


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm("", 0)


def test_every_point_is_somewhere() -> None:
    text = "".join(path.read_text() for path in Path(vitscale.__file__).parent.rglob("*.py"))
    found = re.findall(r'fault_point\("([\w.]+)"\)', text)
    assert sorted(found) == sorted(POINTS)


def test_nothing_happens_unless_it_is_asked_for() -> None:
    for point in POINTS:
        fault_point(point)


def test_an_error_at_the_second_time_on_one_rank() -> None:
    arm("point=row action=raise:ENOSPC rank=1 nth=2", 1)
    fault_point("row")
    fault_point("joined")
    with pytest.raises(OSError, match="fault point row") as caught:
        fault_point("row")
    assert caught.value.errno == errno.ENOSPC
    fault_point("row")  # once
    arm("point=row action=raise:ENOSPC rank=1", 0)
    fault_point("row")


def test_a_signal() -> None:
    program = "from vitscale.faults import arm, fault_point; arm('point=joined action=kill', 0); fault_point('joined')"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "text",
    ["kill", "point=nowhere action=kill", "point=row action=explode", "point=row action=raise:ENOTHING",
     "point=row action=sleep:x", "point=row action=kill nth=x", "point=row action=kill when=now"],
)  # fmt: skip
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(LaunchError, match="must be point=NAME"):
        arm(text, 0)
