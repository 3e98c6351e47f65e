"""A model to the hub: its folder, its card and its processor, as one commit."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from vitscale.errors import CheckpointError
from vitscale.files import hub
from vitscale.files.model_folder import PROCESSOR
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.model_card import Model, RunRecord, model_card
from vitscale.run_folder import RunFolder


def push(
    model: Model,
    repo_id: str,
    *,
    run: Path | None,
    processor: ViTImageProcessor | None,
    max_shard_size: int | str,
    **options: Any,
) -> str:
    """PretrainedMixin.push_to_hub; options: of hub.upload."""
    record = None if run is None else RunRecord.read(run)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder, max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        elif run is not None:
            source = RunFolder(run).model / PROCESSOR
            if not source.is_file():
                raise CheckpointError(f"{source}: no such file; `vitscale export {run}` writes it, or pass processor")
            shutil.copy(source, folder)
        card = model_card(model, repo_id, record, with_processor=(folder / PROCESSOR).exists())
        (folder / hub.CARD).write_text(card, encoding="utf-8")
        return hub.upload(folder, repo_id, new_card=record is not None, **options)
