"""Named points at which a run can be made to fail."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitscale
from vitscale.errors import LaunchError
from vitscale.faults import POINTS, arm, fault_point


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm("", 0)


def test_every_point_is_somewhere() -> None:
    package = Path(vitscale.__file__).parent
    files = [
        path for path in package.rglob("*.py") if not path.is_relative_to(package / "bench")
    ]  # which measures them
    text = "".join(path.read_text() for path in files)
    found = re.findall(r'fault_point\("([\w.]+)"[,)]', text)
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


def test_numbers_are_spoilt_for_some_times() -> None:
    arm("point=batch action=nan nth=2 times=2; point=batch action=scale:10 nth=4", 0)
    sums = []
    for _ in range(5):
        pixels, others = torch.ones(2, 3), torch.ones(2)
        fault_point("batch", lambda: [pixels, others])  # noqa: B023 - called at once
        sums.append(float(pixels.sum()))
        assert float(others.sum()) == 2
    assert [value for value in sums if value == value] == [6, 60, 6]
    assert [value == value for value in sums] == [True, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_is_flipped(dtype: torch.dtype) -> None:
    tensors = [torch.full((2, 2), value, dtype=dtype, requires_grad=True) for value in (1.5, -0.25)]
    before = [each.detach().clone() for each in tensors]
    arm("point=step action=flip:3 rank=1", 1)
    fault_point("step", lambda: tensors)
    assert torch.equal(tensors[0], before[0])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    changed = tensors[1].detach().view(bits) ^ before[1].view(bits)
    assert [bin(int(each) & 0xFFFFFFFF).count("1") for each in changed.flatten()] == [1, 0, 0, 0]


def test_a_signal() -> None:
    program = "from vitscale.faults import arm, fault_point; arm('point=joined action=kill', 0); fault_point('joined')"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "text",
    ["kill", "point=nowhere action=kill", "point=row action=explode", "point=row action=raise:ENOTHING",
     "point=row action=sleep:x", "point=row action=kill nth=x", "point=row action=kill when=now",
     "point=row action=nan", "point=batch action=scale", "point=batch action=scale:x", "point=step action=flip",
     "point=step action=flip:-1", "point=row action=kill:9", "point=batch action=nan times=x"],
)  # fmt: skip
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(LaunchError, match="must be point=NAME"):
        arm(text, 0)
