"""SimMIM (Xie et al. 2022, arXiv 2111.09886): hide random cells, predict their pixels from all tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitscale.config.model_rules import of_pretraining, pair
from vitscale.errors import DataError
from vitscale.models import flops
from vitscale.models.configuration import ViTConfig, refuse
from vitscale.models.losses import masked_l1
from vitscale.models.masking import cell_masking
from vitscale.models.outputs import MaskedImageModelingOutput, can_return_tuple
from vitscale.models.vit import ViTModel, ViTPreTrainedModel


class PixelShuffle(nn.Module):
    """torch's PixelShuffle, for blocks that need not be square: [n, channels * p * q, rows, columns] to
    [n, channels, rows * p, columns * q]."""

    def __init__(self, block: tuple[int, int]) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        (p, q), (rows, columns) = self.block, x.shape[2:]
        x = x.unflatten(1, (-1, p, q)).permute(0, 1, 4, 2, 5, 3)  # ncpqhw -> nchpwq
        return x.reshape(len(x), -1, rows * p, columns * q)


class MaskedImageModel(ViTPreTrainedModel):
    """An encoder with a mask token and SimMIM's decoder: what both models that hide cells have."""

    pixel_loss = staticmethod(masked_l1)

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
        if config.patch_size != config.encoder_stride:
            refuse("encoder_stride", config.encoder_stride, f"the size of a patch, patch_size={config.patch_size}")
        if config.fc_norm:
            refuse("fc_norm", True, f"False: {type(self).__name__} decodes tokens that are not pooled")
        for violation in of_pretraining(vars(config), config.position_embeddings, type(self).__name__):
            refuse(*violation)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.patch_values, kernel_size=1),
            PixelShuffle(pair(config.patch_size)),
        )

    def hidden(self, pixel_values: Tensor, bool_masked_pos: Tensor | None, sample_key: Tensor | None) -> Tensor | None:
        """bool [n, patches]: as given, or drawn from the samples' keys; without both, nothing is hidden in
        evaluation (as in transformers), and training is refused."""
        if bool_masked_pos is not None:
            return bool_masked_pos.bool()
        if sample_key is not None:
            return cell_masking(sample_key, self.grid(pixel_values), self.config.mask_patch, self.config.mask_ratio)
        if self.training:
            raise DataError(f"{type(self).__name__} needs sample_key (int64, one a sample) or bool_masked_pos to train")
        return None

    def decode(self, last_hidden_state: Tensor, pixel_values: Tensor) -> Tensor:
        """Each patch token to the pixels of its patch: [n, channels, height, width]."""
        patches = self.vit.patch_tokens(last_hidden_state)
        return self.decoder(patches.transpose(1, 2).unflatten(2, self.grid(pixel_values)))

    def forward_flops(self) -> int:
        config = self.config
        return flops.encoder(config) + flops.linear(config.num_patches, config.hidden_size, config.patch_values)


class ViTForMaskedImageModeling(MaskedImageModel):
    """SimMIM: mask tokens, a linear decoder, L1 on what is hidden."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        sample_key: Tensor | None = None,
        **options: Any,
    ) -> MaskedImageModelingOutput:
        """`pixel_values`: [n, channels, height, width]; `bool_masked_pos`: [n, patches], 1 where hidden;
        `sample_key`: int64 [n], draws the mask where none is given, and drop path; `options`:
        interpolate_pos_encoding, output_attentions, output_hidden_states."""
        bool_masked_pos = self.hidden(pixel_values, bool_masked_pos, sample_key)
        encoded = self.vit(pixel_values, bool_masked_pos, sample_key=sample_key, **options)
        reconstruction = self.decode(encoded.last_hidden_state, pixel_values)
        loss = None
        if bool_masked_pos is not None:
            loss = self.pixel_loss(pixel_values, reconstruction, bool_masked_pos, pair(self.config.patch_size))
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            bool_masked_pos=bool_masked_pos,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            metrics={},
        )
