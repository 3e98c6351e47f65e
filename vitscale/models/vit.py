"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): image in, token features out.

Modules and their arguments are named as in transformers; inside, query, key and value are one
matrix and attention is torch's fused one. Shapes: n images, `tokens` = 1 class token + patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitscale import rng
from vitscale.config.check import pair
from vitscale.errors import ConfigError, DataError
from vitscale.models import flops
from vitscale.models.configuration import ViTConfig
from vitscale.models.outputs import EncoderOutput, ViTModelOutput
from vitscale.models.positions import Positioned, interpolate_positions

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(key: str, name: str) -> nn.Module:
    """The activation of a config key, by transformers' name for it."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{key}={name!r}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class ViTPatchEmbeddings(nn.Module):
    """Pixels [n, channels, height, width] to patch tokens [n, patches, width], row by row."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        patch = pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise DataError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: must be [n, {self.num_channels}, height, width]; "
                "num_channels of the config is what the model was made for"
            )
        # Pixels stay in float32 for the losses' sake; here they become what the weights are.
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class ViTEmbeddings(Positioned):
    """Patch tokens + positions, with the class token in front; some of them hidden if asked."""

    position_embeddings: Tensor  # [1, tokens, width]

    def __init__(self, config: ViTConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if use_mask_token else None
        self.patch_embeddings = ViTPatchEmbeddings(config)
        self.make_positions("position_embeddings", config.position_embeddings, width, config.grid)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        ids_keep: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """[n, tokens, width]; `bool_masked_pos` [n, patches] puts the mask token there (SimMIM),
        `ids_keep` [n, kept] keeps only these patches (MAE)."""
        x = self.patch_embeddings(pixel_values)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise DataError("bool_masked_pos was given to a model without a mask token: use_mask_token=True")
            x = torch.where(bool_masked_pos.bool()[..., None], self.mask_token.to(x.dtype), x)
        positions = self._positions(pixel_values, interpolate_pos_encoding).to(x.dtype)
        x = x + positions[:, 1:]
        if ids_keep is not None:
            x = torch.gather(x, 1, ids_keep[..., None].expand(-1, -1, x.shape[-1]))
        cls = self.cls_token.to(x.dtype) + positions[:, :1]
        return self.dropout(torch.cat([cls.expand(len(x), -1, -1), x], dim=1))

    def _positions(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        size, (patch_height, patch_width) = tuple(pixel_values.shape[2:]), pair(self.config.patch_size)
        if interpolate:
            new_grid = (size[0] // patch_height, size[1] // patch_width)
            return interpolate_positions(self.position_embeddings, self.config.grid, new_grid)
        if size != pair(self.config.image_size):
            raise DataError(
                f"images of {size[0]}x{size[1]} pixels: the model was made for image_size={self.config.image_size}; "
                "resize them, or pass interpolate_pos_encoding=True"
            )
        return self.position_embeddings


class ViTSelfAttention(nn.Module):
    """softmax(q k' / sqrt(d)) v in every head, over one matrix for query, key and value."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.num_attention_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, tokens, width / heads]
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions:  # the fused kernels do not give the weights
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
            context = weights @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return context.transpose(1, 2).reshape(n, tokens, width), weights


class ViTAttention(nn.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = ViTSelfAttention(config)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        context, weights = self.attention(x, output_attentions)
        return self.output(context), weights


class ViTMLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation("hidden_act", config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ViTLayer(nn.Module):
    """A block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, x: Tensor, branch_scale: Tensor | None = None, output_attentions: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`x`: [n, tokens, width]; `branch_scale`: [n, 2], what drop path multiplies the two branches by."""
        attended, weights = self.attention(self.layernorm_before(x), output_attentions)
        x = x + _scaled(self.dropout(attended), branch_scale, 0)
        x = x + _scaled(self.dropout(self.mlp(self.layernorm_after(x))), branch_scale, 1)
        return x if weights is None else (x, weights)


def _scaled(x: Tensor, branch_scale: Tensor | None, branch: int) -> Tensor:
    return x if branch_scale is None else x * branch_scale[:, branch, None, None].to(x.dtype)


def drop_path_scales(sample_key: Tensor, drop_path_rate: float, layers: int) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382) a sample: float32 [layers, n, 2].

    Layer i drops each of its two branches with probability rate * i / (layers - 1), drawn from the
    sample's key alone; what is kept is divided by the probability of keeping it.
    """
    draws = rng.uniform(sample_key, "drop_path", 2 * layers).view(-1, layers, 2)
    rates = torch.linspace(0, drop_path_rate, layers, dtype=torch.float64, device=draws.device)[:, None]
    return ((draws >= rates) / (1 - rates)).float().transpose(0, 1)


class ViTEncoder(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.drop_path_rate = config.drop_path_rate
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # keep a block's input only, and run it again in backward

    def forward(
        self,
        x: Tensor,
        sample_key: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """`x`: [n, tokens, width]; `sample_key`: int64 [n], needed where drop path is on in training."""
        scales = self._branch_scales(sample_key)
        hidden_states: list[Tensor] = [x] if output_hidden_states else []
        attentions: list[Tensor] = []
        for layer, branch_scale in zip(self.layers, scales, strict=True):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, branch_scale, output_attentions, use_reentrant=False)
            else:
                x = layer(x, branch_scale, output_attentions)
            if output_attentions:
                x, weights = x
                attentions.append(weights)
            if output_hidden_states:
                hidden_states.append(x)
        return EncoderOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) or None,
            attentions=tuple(attentions) or None,
        )

    def _branch_scales(self, sample_key: Tensor | None) -> list[Tensor | None]:
        if not self.training or self.drop_path_rate == 0:
            return [None] * len(self.layers)
        if sample_key is None:
            raise DataError(f"drop_path_rate={self.drop_path_rate} needs sample_key (int64, one a sample) in training")
        return list(drop_path_scales(sample_key, self.drop_path_rate, len(self.layers)).unbind(0))


class ViTPooler(nn.Module):
    """The class token through a dense layer and an activation: [n, pooler_output_size]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size or config.hidden_size)
        self.activation = activation("pooler_act", config.pooler_act)

    def forward(self, last_hidden_state: Tensor) -> Tensor:
        return self.activation(self.dense(last_hidden_state[:, 0]))


class ViTPreTrainedModel(nn.Module):
    """What all models have: a config, blocks to compile or checkpoint, and their cost."""

    config_class: ClassVar[type[ViTConfig]] = ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            wanted = self.config_class.__name__
            raise ConfigError(f"{type(self).__name__} needs a {wanted}, not a {type(config).__name__}")
        self.config = config

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches along (height, width) of these images; DataError where they do not come out even."""
        (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], pair(self.config.patch_size)
        if height % patch_height or width % patch_width:
            raise DataError(f"images of {height}x{width} pixels: must be a multiple of {patch_height}x{patch_width}")
        return height // patch_height, width // patch_width

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, a decoder's too."""
        return [layer for module in self.modules() if isinstance(module, ViTEncoder) for layer in module.layers]

    def gradient_checkpointing_enable(self) -> None:
        """Trade time for memory: blocks run again in backward instead of keeping their insides."""
        for module in self.modules():
            if isinstance(module, ViTEncoder):
                module.gradient_checkpointing = True

    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward (see models/flops.py)."""
        return flops.encoder(self.config)

    def flops_per_image(self) -> int:
        """Floating-point operations of training on one image: forward, and twice that backward."""
        return 3 * self.forward_flops()


class ViTModel(ViTPreTrainedModel):
    """The encoder: features of every token, and the pooled class token."""

    def __init__(self, config: ViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config, use_mask_token)
        self.encoder = ViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        ids_keep: Tensor | None = None,
        sample_key: Tensor | None = None,
        **options: Any,
    ) -> ViTModelOutput:
        """`pixel_values`: [n, channels, height, width]; `bool_masked_pos`, `ids_keep`: see ViTEmbeddings;
        `sample_key`: int64 [n]; `options`: interpolate_pos_encoding, output_attentions, output_hidden_states."""
        interpolate = options.pop("interpolate_pos_encoding", False)
        x = self.embeddings(pixel_values, bool_masked_pos, ids_keep, interpolate)
        encoded = self.encoder(x, sample_key, **options)
        last_hidden_state = self.layernorm(encoded.last_hidden_state)
        return ViTModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pooler(last_hidden_state) if self.pooler is not None else None,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
