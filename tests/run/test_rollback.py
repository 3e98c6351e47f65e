from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vitscale.checkpoint.store import checkpoint_folders, folder_name
from vitscale.config.load import config_of
from vitscale.config.schema import AUTO, Checkpoint, Guard, Log, Optimizer, Parallel, Run, RunConfig
from vitscale.config.step import with_step
from vitscale.errors import VitscaleError
from vitscale.run.rollback import kept_for_rollback, numbers_digest, refuse_the_same_end
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
    folder.diverged.write_text(f'{{"step": 70, "reason": "spike", "numbers": "{numbers_digest(config)}"}}')
    for same in (config, config, replace(config, log=Log(every_steps=7), run=Run(name="moved", dir="elsewhere")),
                 replace(config, checkpoint=Checkpoint(keep=9), parallel=Parallel(timeout_s=99))):  # fmt: skip
        with pytest.raises(VitscaleError, match=r"diverged at step 70, .* with the same config \(spike\); "):
            refuse_the_same_end(folder, same)
    refuse_the_same_end(folder, replace(config, guard=Guard(rollback=True)))
    refuse_the_same_end(folder, config)  # the way is free, whatever comes next


def test_what_was_chosen_counts_where_a_key_is_auto(tmp_path: Path) -> None:
    folder, chosen = RunFolder(tmp_path), with_step(RunConfig(), 2, 16)
    folder.auto.write_text('{"parallel.zero_stage": 2, "train.micro_batch": 16, "ratio": 1.0}')
    folder.diverged.write_text(f'{{"step": 70, "reason": "spike", "numbers": "{numbers_digest(chosen)}"}}')
    for same in (chosen, with_step(chosen, AUTO, AUTO), with_step(chosen, 2, AUTO)):
        with pytest.raises(VitscaleError, match="diverged at step 70"):
            refuse_the_same_end(folder, same)
    refuse_the_same_end(folder, with_step(chosen, 0, AUTO))


@pytest.mark.parametrize(
    "changed",
    [{"optimizer": Optimizer(lr=1e-5)}, {"run": Run(seed=1)}, {"parallel": Parallel(zero_stage=2)},
     {"guard": Guard(max_rollbacks=9)}, {"checkpoint": Checkpoint(resume_from="elsewhere")}],
)  # fmt: skip
def test_what_changes_a_number_may_end_otherwise(changed: dict[str, Any]) -> None:
    assert numbers_digest(replace(RunConfig(), **changed)) != numbers_digest(RunConfig())


def test_names_of_classes_that_a_start_has_found_change_no_number() -> None:
    """Those beside the shards: the next start is refused before it looks for them."""
    config = config_of({}, ["train.steps=1", "model.num_labels=2"])
    named = replace(config, model=replace(config.model, id2label=("cat", "dog")))
    assert numbers_digest(named) == numbers_digest(config)
