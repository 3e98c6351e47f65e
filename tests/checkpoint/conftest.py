from __future__ import annotations

from collections.abc import Callable

import pytest

from vitscale import faults


@pytest.fixture
def at_point(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """at_point(name, act): `act` is called when a save gets to that point."""

    def arm(name: str, act: Callable[[], None]) -> None:
        assert name in faults.POINTS
        monkeypatch.setattr(faults, "at_point", lambda point, _: act() if point == name else None)

    return arm
