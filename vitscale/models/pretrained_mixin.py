"""from_pretrained, save_pretrained and push_to_hub, by transformers' calls, for models and configs.

What they do is interop's business, which stands above this room: it is imported when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

if TYPE_CHECKING:
    import torch

    from vitscale.interop.image_processing import ViTImageProcessor
    from vitscale.interop.loading import LoadReport
    from vitscale.models.configuration import ViTConfig

Source = str | Path


class PretrainedMixin:
    """For ViTPreTrainedModel."""

    @overload
    @classmethod
    def from_pretrained(
        cls, source: Source, *, output_loading_info: Literal[True], **options: Any
    ) -> tuple[Self, LoadReport]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, source: Source, *, output_loading_info: Literal[False] = False, **options: Any
    ) -> Self: ...

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        *,
        config: ViTConfig | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        dtype: str | torch.dtype | None = None,
        ignore_mismatched_sizes: bool = False,
        take: str | None = None,
        output_loading_info: bool = False,
        **config_overrides: Any,
    ) -> Any:
        """A model of this class with a folder's weights, on the CPU, in evaluation mode.

        source: a model's folder (ours, transformers' or timm's), a run's folder, a name on the hub, or a file of
        weights of whatever framework (docs/models.md); take: which of several sets of weights in it; revision,
        cache_dir, local_files_only, token, subfolder: of the hub. dtype: None for float32, "auto" for the
        folder's. config, config_overrides: another config, or other keys of it; image_size resizes learned
        positions, num_channels adapts the patch embedding (interop/channels.py).

        The encoder must be there whole. A head that the folder does not have is new, drawn as
        models/auto.py says; one of another shape (num_labels) is an error, or new as well with
        ignore_mismatched_sizes. Whatever is new, adapted or not used is said on stderr and is in the
        LoadReport, which comes as a second value with output_loading_info. ViTModel takes
        add_pooling_layer and use_mask_token too; by default it has what the folder has.
        Raises CheckpointError for folders and names, ConfigError for keys.
        """
        from vitscale.interop.loading import load_pretrained

        model, report = load_pretrained(
            cls,  # type: ignore[arg-type]  # what this is mixed into
            source,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            take=take,
            overrides=config_overrides,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            subfolder=subfolder,
        )
        return (model, report) if output_loading_info else model

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "50GB") -> None:
        """Write config.json and the weights, which transformers opens too where its ViT can be such a model.

        max_shard_size: of a file, in bytes or as "5GB". CheckpointError where the folder cannot be written.
        """
        from vitscale.interop.pretrained import save_pretrained

        save_pretrained(self, folder, max_shard_size)  # type: ignore[arg-type]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        processor: ViTImageProcessor | None = None,
        commit_message: str = "Upload a model of vitscale",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> str:
        """Upload the model with a card, as one commit; gives its URL.

        run: the folder of the run that made it: the card then tells of its data, recipe and scores, and its
        processor goes along. processor: another one. The repository is made where there is none; the other
        arguments are huggingface_hub's. CheckpointError with the hub's answer where it refuses.
        """
        from vitscale.interop.publish import push

        return push(
            self,  # type: ignore[arg-type]
            repo_id,
            run=None if run is None else Path(run),
            processor=processor,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
        )
