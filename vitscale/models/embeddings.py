"""From pixels to tokens: patches projected, positions added, the tokens of no patch put in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.config.model_rules import pair
from vitscale.errors import DataError
from vitscale.models.configuration import ViTConfig
from vitscale.models.positions import Positioned, interpolate_positions


class _Projection(nn.Conv2d):
    """A convolution without overlap: of patches that are cut out already, a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Of images as a convolution; of patches [n, patches, channels * height * width]: [n, patches, width]."""
        return super().forward(x) if x.ndim == 4 else F.linear(x, self.weight.flatten(1), self.bias)


class ViTPatchEmbeddings(nn.Module):
    """Pixels [n, channels, height, width] to patch tokens [n, patches, width], row by row."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        patch = pair(config.patch_size)
        self.projection = _Projection(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """`ids_keep` [n, kept]: of these patches alone."""
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise DataError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: must be [n, {channels}, height, width]; "
                "num_channels of the config is what the model was made for"
            )
        # No patch is cut short: the convolution would leave it out.
        rows, columns = self.config.grid_of(*pixel_values.shape[2:])
        # Pixels stay in float32 for the losses' sake; here they become what the weights are.
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        if ids_keep is None:
            return self.projection(pixel_values).flatten(2).transpose(1, 2)
        patches = pixel_values.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        image = torch.arange(len(patches), device=patches.device)[:, None]
        return self.projection(patches[image, ids_keep // columns, ids_keep % columns].flatten(2))


class ViTEmbeddings(Positioned):
    """Tokens [class token, registers, patches], patches and class token with positions; some hidden if asked.

    They are of the parameters' dtype, also under autocast: what the blocks add up is float32 there, and
    only what is multiplied is bfloat16, as in MAE's own training (facebookresearch/mae, engine_pretrain.py:
    autocast around models_mae.py, whose positions and mask tokens are float32) and in transformers.
    """

    position_embeddings: Tensor | None  # [1, class token + patches, width]

    def __init__(self, config: ViTConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        width, registers = config.hidden_size, config.num_register_tokens
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if use_mask_token else None
        self.patch_embeddings = ViTPatchEmbeddings(config)
        kind, prefix = config.position_embeddings, int(config.use_cls_token)
        self.make_positions("position_embeddings", kind, width, config.grid, prefix)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        ids_keep: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """[n, tokens, width]; `bool_masked_pos` [n, patches] puts the mask token there (SimMIM),
        `ids_keep` [n, kept] keeps only these patches (MAE), of which it then speaks."""
        x = self.patch_embeddings(pixel_values, ids_keep).to(self.patch_embeddings.projection.weight.dtype)
        if bool_masked_pos is not None:
            x = self._hidden(x, bool_masked_pos)
        positions = self._positions(pixel_values, interpolate_pos_encoding)
        if positions is not None:
            positions = positions.to(x.dtype)
            of_patches = positions[:, self.positions_prefix :]
            if ids_keep is not None:
                places = ids_keep[..., None].expand(-1, -1, x.shape[-1])
                of_patches = torch.gather(of_patches.expand(len(x), -1, -1), 1, places)
            x = x + of_patches
        front = []
        if self.cls_token is not None:
            front.append(self.cls_token if positions is None else self.cls_token + positions[:, :1])
        if self.register_tokens is not None:
            front.append(self.register_tokens)
        return self.dropout(torch.cat([*[tokens.expand(x.shape[0], -1, -1) for tokens in front], x], dim=1))

    def _hidden(self, x: Tensor, bool_masked_pos: Tensor) -> Tensor:
        if self.mask_token is None:
            raise DataError("bool_masked_pos was given to a model without a mask token: use_mask_token=True")
        if bool_masked_pos.shape != x.shape[:2]:
            raise DataError(
                f"bool_masked_pos of shape {tuple(bool_masked_pos.shape)}: must be {tuple(x.shape[:2])}, one a patch"
            )
        return torch.where(bool_masked_pos.bool()[..., None], self.mask_token, x)

    def _positions(self, pixel_values: Tensor, interpolate: bool) -> Tensor | None:
        size = tuple(pixel_values.shape[2:])
        if not interpolate and size != pair(self.config.image_size):
            raise DataError(
                f"images of {size[0]}x{size[1]} pixels: the model was made for image_size={self.config.image_size}; "
                "resize them (ViTImageProcessor does), pass interpolate_pos_encoding=True, "
                "or load the model with image_size= of theirs"
            )
        if not interpolate or self.position_embeddings is None:
            return self.position_embeddings
        return interpolate_positions(self.position_embeddings, self.config.grid, self.config.grid_of(*size))
