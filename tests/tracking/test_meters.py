from __future__ import annotations

import pytest

from vitscale.tracking.meters import Meters


def test_shares_and_speed_between_two_reads():
    now = 100.0
    meters = Meters(clock=lambda: now)
    for _ in range(4):
        now += 1.5
        meters.add({"data": 0.5, "step": 1.0})
        meters.count(256)
    for what, seconds in (("save", 1.5), ("evaluation", 0.5)):
        with meters.measure(what):
            now += seconds
    row = meters.read()
    assert row == pytest.approx(
        {
            "images_per_second": 4 * 256 / 8,
            "step_seconds": 1.5,
            "data_share": 2 / 8,
            "step_share": 4 / 8,
            "save_share": 1.5 / 8,
            "evaluation_share": 0.5 / 8,
        }
    )
    now += 2.0
    meters.count(100)
    assert meters.read() == pytest.approx(
        {
            "images_per_second": 50,
            "step_seconds": 2.0,
            "data_share": 0,
            "step_share": 0,
            "save_share": 0,
            "evaluation_share": 0,
        }
    )


def test_time_is_counted_when_the_work_fails():
    now = 0.0
    meters = Meters(clock=lambda: now)

    def failing() -> None:
        nonlocal now
        with meters.measure("step"):
            now += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert meters.read()["step_share"] == 1.0


def test_by_the_real_clock():
    meters = Meters()
    with meters.measure("step"):
        meters.count(1)
    row = meters.read()
    assert 0 <= row["step_share"] <= 1
    assert row["images_per_second"] > 0
