"""ViTMAEConfig: transformers' keys and defaults for a masked autoencoder, and the keys of our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from vitscale.config import model_rules
from vitscale.config.model_rules import Violation
from vitscale.models.configuration import ViTConfig


@dataclass(kw_only=True)
class ViTMAEConfig(ViTConfig):
    """transformers' ViTMAEConfig, with its defaults, and the keys of our own."""

    model_type: ClassVar[str] = "vit_mae"

    mask_ratio: float = 0.75
    norm_pix_loss: bool = False  # each patch's target is standardized
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    position_embeddings: str = "sincos"  # the encoder's and the decoder's

    def _violations(self) -> Iterator[Violation]:
        yield from super()._violations()
        if self.head_dim is not None:
            yield Violation("head_dim", self.head_dim, "None: transformers gives it to the decoder's heads too")
        yield from model_rules.of_blocks(vars(self), self.position_embeddings, "decoder_")
        if self.norm_pix_loss and self.patch_values < 2:
            yield Violation("norm_pix_loss", True, "false where a patch is a single number")
        if self.visible_patches < 1:
            yield Violation("mask_ratio", self.mask_ratio, f"such that one of {self.num_patches} patches stays visible")
        if self.fc_norm:
            yield Violation("fc_norm", True, "False: a masked autoencoder decodes tokens that are not pooled")
        yield from model_rules.of_pretraining(vars(self), self.position_embeddings, "a masked autoencoder")

    @property
    def beyond_transformers(self) -> list[str]:
        """The same of transformers' ViTMAE: it has squares only, and nothing in it is pooled."""
        keys = [name for name in super().beyond_transformers if name != "pooling"]
        return keys + [name for name in ("image_size", "patch_size") if isinstance(getattr(self, name), tuple)]

    @property
    def visible_patches(self) -> int:
        return int(self.num_patches * (1 - self.mask_ratio))

    def decoder(self) -> ViTConfig:
        """The shape of the decoder's blocks."""
        return replace(
            self,
            hidden_size=self.decoder_hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
            drop_path_rate=0.0,
        )
