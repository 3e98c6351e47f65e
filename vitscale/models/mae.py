"""Masked autoencoders (He et al. 2022, arXiv 2111.06377): encode what is visible, decode the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitscale.config.model_rules import pair
from vitscale.errors import DataError
from vitscale.models import flops
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.losses import masked_mse, patch_statistics, patchify
from vitscale.models.masking import mask_noise, random_masking
from vitscale.models.outputs import MAEOutput, can_return_tuple
from vitscale.models.positions import Positioned, interpolate_positions, rotary_positions
from vitscale.models.vit import ViTEncoder, ViTModel, ViTPreTrainedModel


class ViTMAEDecoder(Positioned):
    """The encoded visible patches, and a mask token for each hidden one, to the pixels of every patch.

    Its blocks have the encoder's options (rotary positions, layer scale, ...). The class token goes
    through it, as in MAE; register tokens, which stand for nothing, stay behind.
    """

    decoder_pos_embed: Tensor | None  # [1, class token + patches, decoder width]

    def __init__(self, config: ViTMAEConfig) -> None:
        super().__init__()
        width, prefix = config.decoder_hidden_size, int(config.use_cls_token)
        self.grid, self.rope_theta = config.grid, config.rope_theta
        self.registers = slice(prefix, prefix + config.num_register_tokens)
        self.head_width = config.decoder().head_width
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.make_positions("decoder_pos_embed", config.position_embeddings, width, config.grid, prefix)
        self.transformer = ViTEncoder(config.decoder())
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, config.patch_values)

    def forward(
        self, latent: Tensor, ids_restore: Tensor, grid: tuple[int, int], interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """`latent`: [n, tokens, width], the encoder's; `ids_restore`: [n, patches]; `grid`: patches along
        (height, width). Gives [n, patches, patch_values]."""
        prefix = self.registers.start
        if self.registers.stop > prefix:
            latent = torch.cat([latent[:, :prefix], latent[:, self.registers.stop :]], dim=1)
        x = self.decoder_embed(latent).to(self.mask_token.dtype)  # under autocast float32 again: see ViTEmbeddings
        cls, visible = x[:, :prefix], x[:, prefix:]
        n, patches = ids_restore.shape
        hidden = self.mask_token.expand(n, patches - visible.shape[1], -1)
        shuffled = torch.cat([visible, hidden], dim=1)
        restored = torch.gather(shuffled, 1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([cls, restored], dim=1)
        positions, rotary = self._positions(patches, interpolate_pos_encoding), None
        if positions is not None:
            x = x + positions.to(x.dtype)
        if self.rope_theta is not None:
            rotary = rotary_positions(grid, self.head_width, self.rope_theta, x.device)
        x = self.transformer(x, rotary=rotary).last_hidden_state
        return self.decoder_pred(self.decoder_norm(x)[:, prefix:])

    def _positions(self, patches: int, interpolate: bool) -> Tensor | None:
        positions = self.decoder_pos_embed
        if positions is None or not interpolate:
            return positions
        # transformers stretches the row of all patches here, not the grid; folders must agree with it.
        return interpolate_positions(positions, (1, self.grid[0] * self.grid[1]), (1, patches))


class ViTMAEForPreTraining(ViTPreTrainedModel):
    """The masked autoencoder and its loss."""

    config_class = ViTMAEConfig
    config: ViTMAEConfig
    pixel_loss = staticmethod(masked_mse)

    def __init__(self, config: ViTMAEConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.decoder = ViTMAEDecoder(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        sample_key: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> MAEOutput:
        """`pixel_values`: [n, channels, height, width]; `noise`: [n, patches], whose largest are hidden, drawn
        from `sample_key` (int64 [n]) where it is not given, and from torch's generator in evaluation
        without both; `options`: output_attentions, output_hidden_states, of the encoder."""
        if noise is None:
            noise = self._noise(pixel_values, sample_key)
        ids_keep, mask, ids_restore = random_masking(noise, self.config.mask_ratio)

        options["interpolate_pos_encoding"] = interpolate_pos_encoding
        encoded = self.vit(pixel_values, ids_keep=ids_keep, sample_key=sample_key, **options)
        grid = self.grid(pixel_values)
        logits = self.decoder(encoded.last_hidden_state, ids_restore, grid, interpolate_pos_encoding)

        patch, normalized = pair(self.config.patch_size), self.config.norm_pix_loss
        return MAEOutput(
            loss=self.pixel_loss(pixel_values, logits, mask, patch, normalized),
            logits=logits,
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            metrics={},
        )

    def _noise(self, pixel_values: Tensor, sample_key: Tensor | None) -> Tensor:
        rows, columns = self.grid(pixel_values)
        if sample_key is not None:
            return mask_noise(sample_key, rows * columns)
        if self.training:
            raise DataError(f"{type(self).__name__} needs sample_key (int64, one a sample) or noise to train")
        return torch.rand(len(pixel_values), rows * columns, device=pixel_values.device)

    def patchify(self, pixel_values: Tensor) -> Tensor:
        """[n, channels, height, width] to [n, patches, patch_values]: pixel by pixel, channels last."""
        return patchify(pixel_values, pair(self.config.patch_size))

    def unpatchify(self, patches: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """The way back; `image_size`: (height, width), the config's where not given."""
        (height, width), (p, q) = image_size or pair(self.config.image_size), pair(self.config.patch_size)
        x = patches.reshape(len(patches), height // p, width // q, p, q, self.config.num_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)  # nhwpqc -> nchpwq

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor, output: MAEOutput) -> Tensor:
        """The images with what was hidden as predicted: float32 [n, channels, height, width].

        With norm_pix_loss a prediction has no brightness or contrast of its own: it takes the true patch's.
        """
        patches, predicted = self.patchify(pixel_values.float()), output.logits.float()
        if self.config.norm_pix_loss:
            mean, scale = patch_statistics(patches)
            predicted = predicted * scale + mean
        patches = torch.where(output.mask[..., None] > 0, predicted, patches)
        height, width = pixel_values.shape[2:]
        return self.unpatchify(patches, (height, width))

    def forward_flops(self) -> int:
        config, decoder = self.config, self.config.decoder()
        prefix = int(config.use_cls_token)  # the decoder has no register tokens
        embed = flops.linear(prefix + config.visible_patches, config.hidden_size, decoder.hidden_size)
        predict = flops.linear(config.num_patches, decoder.hidden_size, config.patch_values)
        return (
            flops.encoder(config, config.visible_patches)
            + embed
            + flops.blocks(decoder, prefix + config.num_patches)
            + predict
        )
