"""Thousands of damaged shards of damaged images: no crash, no hang, no memory without bound, no sample lost unsaid."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("first", "count", "processes"), [(0, 300, 1), pytest.param(300, 9_700, 2, marks=[pytest.mark.full])]
)
@pytest.mark.timeout(3_600)
def test_the_zoo(tmp_path: Path, first: int, count: int, processes: int) -> None:
    share = count // processes

    def visit(process: int) -> list[list[object]]:
        folder = tmp_path / str(process)
        folder.mkdir()
        argv = [sys.executable, "-m", "tests.data.zoo", str(first + process * share), str(share), str(folder)]
        with (folder / "said").open("w+") as said:
            ended = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True, check=False)
            said.seek(0)
            lines = [line for line in said if "belong to no sample" not in line and "is made again" not in line]
        begun = (folder / "begun").read_text().split()[-1:]
        assert ended.returncode == 0, f"shard {begun}: exit code {ended.returncode}\n{''.join(lines[-100:])}"
        return [json.loads(line) for line in ended.stdout.splitlines()]

    with ThreadPoolExecutor(processes) as pool:
        numbers, *totals, faults = zip(
            *(line for lines in pool.map(visit, range(processes)) for line in lines), strict=True
        )
    assert list(numbers) == list(range(first, first + count))
    assert not [fault for fault in zip(numbers, faults, strict=True) if fault[1]], (
        "python -m tests.data.zoo NUMBER 1 FOLDER"
    )
    assert all(sum(total) > count // 4 for total in totals), "samples are delivered and reported, and shards refused"
