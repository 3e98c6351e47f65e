"""The engine on real ranks, at every stage."""

from __future__ import annotations

import pytest

from tests.engine import on_ranks
from tests.integration.worlds import Launcher

STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_no_later_step_changes_a_snapshot(launcher: Launcher, stage: int) -> None:
    launcher.call(on_ranks.snapshot, ranks=2, stage=stage)
