from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vitscale.checkpoint.store import checkpoint_folders, folder_name
from vitscale.config.schema import Guard, RunConfig
from vitscale.errors import VitscaleError
from vitscale.run.rollback import kept_for_rollback, refuse_the_same_end
from vitscale.run.session import config_digest
from vitscale.run_folder import RunFolder


@pytest.mark.parametrize(("every", "before"), [(2, 4), (5, 3), (10, 100), (7, 50)])
def test_a_checkpoint_from_before_a_spike_is_kept(tmp_path: Path, every: int, before: int) -> None:
    """With checkpoint.keep=1 there is always one that is old enough, and not older than twice that and a save."""
    folder = RunFolder(tmp_path)
    config = RunConfig(guard=Guard(rollback=True, rollback_steps=before))
    for step in range(every, 500, every):
        kept = {*kept_for_rollback(folder, config, step), step}
        (folder.checkpoints / folder_name(step)).mkdir(parents=True)
        for path in checkpoint_folders(folder.checkpoints):
            if path.name not in map(folder_name, kept):
                shutil.rmtree(path)
        assert len(kept) <= 3
        if step > 2 * (before + every):
            assert step - 2 * before - every <= max(each for each in kept if each <= step - before)
    assert kept_for_rollback(folder, RunConfig(), 500) == []


def test_the_same_config_is_not_started_into_the_same_end(tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path), RunConfig()
    refuse_the_same_end(folder, config)
    folder.diverged.write_text(f'{{"step": 70, "reason": "spike", "config": "{config_digest(config)}"}}')
    for _ in range(2):
        with pytest.raises(VitscaleError, match=r"diverged at step 70, .* with the same config \(spike\); "):
            refuse_the_same_end(folder, config)
    refuse_the_same_end(folder, replace(config, guard=Guard(rollback=True)))
    refuse_the_same_end(folder, config)  # the way is free, whatever comes next
