"""How long a read takes that meets a fault, by the real waits: the table in docs/data.md is what `-s` prints."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.files import web as faults
from tests.files.web import Misbehave, served
from vitscale.files.http import HttpFiles

pytestmark = pytest.mark.full
PIECE = 4 << 20
FAULTS: dict[str, list[Misbehave]] = {
    "none": [],
    "503, once": [faults.status(503)],
    "503, five times": [faults.status(503)] * 5,
    "429 with Retry-After: 2": [faults.status(429, Retry_After="2")],
    "cut in the midst": [faults.cut_after(PIECE // 2)],
    "cut four times": [faults.cut_after(PIECE // 5)] * 4,
    "connection closed": [faults.hang_up],
    "no bytes any more": [faults.stall_after(1000, 120)],
    "a byte now and then": [faults.drip(120)],
    "ranges ignored (200 for 206)": [faults.whole_without_ranges],
    "another range than was asked for": [faults.with_headers(Content_Range="bytes 5-9/100")],
}


def test_seconds_until_a_read_is_there() -> None:
    data = np.random.default_rng(0).bytes(3 * PIECE)

    def seconds(sequence: list[Misbehave]) -> tuple[float, int]:
        with served() as web:
            web.files["/a.tar"] = data
            store, url = HttpFiles(), f"{web.url}/a.tar"
            store.stat(url)
            web.faults["/a.tar"], before = list(sequence), len(web.requests)
            started = time.perf_counter()
            assert store.read(url, PIECE, PIECE) == data[PIECE : 2 * PIECE]
            return time.perf_counter() - started, len(web.requests) - before

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(seconds, FAULTS.values()))
    print("\n| fault | seconds | requests |\n|---|---|---|")
    for name, (each, requests) in zip(FAULTS, taken, strict=True):
        print(f"| {name} | {each:.2f} | {requests} |")
