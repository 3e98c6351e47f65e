"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): image in, token features out.

Modules and their arguments are named as in transformers; inside, query, key and value are one
matrix and attention is torch's fused one. Shapes: n images, `tokens` = class token + registers +
patches, as the config has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from vitscale import rng
from vitscale.errors import ConfigError, DataError
from vitscale.models import flops
from vitscale.models.activations import ACTIVATIONS
from vitscale.models.attention import ViTAttention
from vitscale.models.configuration import ViTConfig
from vitscale.models.embeddings import ViTEmbeddings
from vitscale.models.outputs import EncoderOutput, ViTModelOutput, can_return_tuple
from vitscale.models.positions import Rotary, of_patches, rotary_positions
from vitscale.models.pretrained_mixin import PretrainedMixin

_DROP_PATH = rng.purpose_code("drop_path")
_aten = torch.ops.aten
# What selective checkpointing keeps: nearly all of a block's work.
_KEPT = partial(create_selective_checkpoint_contexts, [
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
])  # fmt: skip


class SwiGLU(nn.Module):
    """silu(a) * b of the halves a, b of the last dimension (Shazeer 2020, arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class ViTMLP(nn.Module):
    """Two linear layers; with swiglu the first gives both the gate and what it gates."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = config.intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, 2 * hidden if config.swiglu else hidden)
        self.activation = SwiGLU() if config.swiglu else ACTIVATIONS[config.hidden_act]()
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
        self.layer_scale_before = _layer_scale(config)
        self.layer_scale_after = _layer_scale(config)
        self.selective = False  # keep matrix products and attention, and run the rest again in backward

    def forward(
        self,
        x: Tensor,
        branch_scale: Tensor | None = None,
        rotary: Rotary | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`x`: [n, tokens, width]; `branch_scale`: [n, 2], what drop path multiplies the two branches by;
        `rotary`: where the patches are."""
        if self.selective and self.training:  # here, not around the block: what is compiled has to see it
            inputs = (x, branch_scale, rotary, output_attentions)
            return checkpoint(self._run, *inputs, use_reentrant=False, context_fn=_KEPT)
        return self._run(x, branch_scale, rotary, output_attentions)

    def _run(
        self, x: Tensor, branch_scale: Tensor | None, rotary: Rotary | None, output_attentions: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        attended, weights = self.attention(self.layernorm_before(x), rotary, output_attentions)
        x = x + _scaled(self.dropout(attended), self.layer_scale_before, branch_scale, 0)
        x = x + _scaled(self.dropout(self.mlp(self.layernorm_after(x))), self.layer_scale_after, branch_scale, 1)
        return x if weights is None else (x, weights)


def _layer_scale(config: ViTConfig) -> nn.Parameter | None:
    """Touvron et al. 2021 (arXiv 2103.17239): a learned factor of every feature."""
    start = config.layer_scale_init_value
    return None if start is None else nn.Parameter(torch.full((config.hidden_size,), start))


def _scaled(x: Tensor, layer_scale: Tensor | None, branch_scale: Tensor | None, branch: int) -> Tensor:
    if layer_scale is not None:
        x = x * layer_scale.to(x.dtype)
    return x if branch_scale is None else x * branch_scale[:, branch, None, None].to(x.dtype)


def drop_path_scales(sample_key: Tensor, drop_path_rate: float, layers: int) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382) a sample: float32 [layers, n, 2].

    Layer i drops each of its two branches with probability rate * i / (layers - 1), drawn from the
    sample's key alone; what is kept is divided by the probability of keeping it.
    """
    draws = rng.uniform(sample_key, _DROP_PATH, 2 * layers).view(-1, layers, 2)
    rates = torch.linspace(0, drop_path_rate, layers, dtype=torch.float64, device=draws.device)[:, None]
    return ((draws >= rates) / (1 - rates)).float().transpose(0, 1)


class ViTEncoder(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.drop_path_rate = config.drop_path_rate
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # keep a block's input only, and run it again in backward

    @property
    def layer(self) -> nn.ModuleList:
        """The blocks, by transformers 4's name, as hooks of tutorials know it: `vit.encoder.layer[0]`."""
        return self.layers

    def forward(
        self,
        x: Tensor,
        sample_key: Tensor | None = None,
        rotary: Rotary | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """`x`: [n, tokens, width]; `sample_key`: int64 [n], needed where drop path is on in training;
        `rotary`: where the patches are, the last tokens."""
        scales = self._branch_scales(sample_key)
        hidden_states: list[Tensor] = [x] if output_hidden_states else []
        attentions: list[Tensor] = []
        for layer, branch_scale in zip(self.layers, scales, strict=True):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, branch_scale, rotary, output_attentions, use_reentrant=False)
            else:
                x = layer(x, branch_scale, rotary, output_attentions)
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
    """Pooled tokens [n, width] through a dense layer and an activation: [n, pooler_output_size]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size or config.hidden_size)
        self.activation = ACTIVATIONS[config.pooler_act]()

    def forward(self, pooled: Tensor) -> Tensor:
        return self.activation(self.dense(pooled))


class ViTPreTrainedModel(PretrainedMixin, nn.Module):
    """What all models have: a config, blocks to compile or checkpoint, and their cost."""

    config_class: ClassVar[type[ViTConfig]] = ViTConfig
    pixel_loss: Callable[..., Tensor] | None = None  # of models that predict pixels: a function of tensors alone

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            wanted = self.config_class.__name__
            raise ConfigError(f"{type(self).__name__} needs a {wanted}, not a {type(config).__name__}")
        self.config = config

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches along (height, width) of these images; DataError where they do not come out even."""
        return self.config.grid_of(*pixel_values.shape[-2:])

    @property
    def base_model(self) -> ViTModel:
        """The encoder: itself, or what its heads stand on."""
        model = self if isinstance(self, ViTModel) else self.vit
        assert isinstance(model, ViTModel)
        return model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Module:
        """Pixels to patch tokens."""
        return self.base_model.embeddings.patch_embeddings

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, a decoder's too."""
        return [layer for module in self.modules() if isinstance(module, ViTEncoder) for layer in module.layers]

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile of every block's forward, and of a loss over pixels; `options`: of torch.compile.

        The blocks of an encoder share one graph, those of a decoder another, each of one length. What is hooked
        around a block stays outside: ZeRO-3's hooks fetch weights, which would break the graph.
        """
        for block in self.blocks():
            block.forward = torch.compile(block.forward, dynamic=False, **options)
        if self.pixel_loss is not None:
            self.pixel_loss = torch.compile(self.pixel_loss, dynamic=False, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, selective: bool = False
    ) -> None:
        """Trade time for memory: blocks run again in backward instead of keeping their insides; selective: but for
        matrix products and attention, which are kept.

        Takes transformers' argument; there is one way, {"use_reentrant": False}.
        """
        if gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}):
            given = f"gradient_checkpointing_kwargs={gradient_checkpointing_kwargs}"
            raise ConfigError(f"{given}: must be {{'use_reentrant': False}}, or left out")
        self._checkpoint(whole=not selective, selective=selective)

    def gradient_checkpointing_disable(self) -> None:
        self._checkpoint(whole=False, selective=False)

    def _checkpoint(self, whole: bool, selective: bool) -> None:
        for module in self.modules():
            if isinstance(module, ViTEncoder):
                module.gradient_checkpointing = whole
            elif isinstance(module, ViTLayer):
                module.selective = selective

    def forward_flops(self) -> int:
        """Floating-point operations of one image's forward (see models/flops.py)."""
        return flops.encoder(self.config)

    def flops_per_image(self) -> int:
        """Floating-point operations of training on one image: forward, and twice that backward."""
        return 3 * self.forward_flops()


class ViTModel(ViTPreTrainedModel):
    """The encoder: features of every token, and the pooled ones."""

    def __init__(self, config: ViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config, use_mask_token)
        self.encoder = ViTEncoder(config)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm = nn.Identity() if config.fc_norm else norm  # fc_norm: the classifier's own comes later
        self.pooler = ViTPooler(config) if add_pooling_layer else None

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        ids_keep: Tensor | None = None,
        sample_key: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> ViTModelOutput:
        """`pixel_values`: [n, channels, height, width]; `bool_masked_pos`, `ids_keep`: see ViTEmbeddings;
        `sample_key`: int64 [n]; `interpolate_pos_encoding`: for images of another size than image_size."""
        x = self.embeddings(pixel_values, bool_masked_pos, ids_keep, interpolate_pos_encoding)
        rotary = self._rotary(pixel_values, ids_keep)
        encoded = self.encoder(x, sample_key, rotary, output_attentions, output_hidden_states)
        last_hidden_state = self.layernorm(encoded.last_hidden_state)
        return ViTModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pooler(self.pool(last_hidden_state)) if self.pooler is not None else None,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _rotary(self, pixel_values: Tensor, ids_keep: Tensor | None) -> Rotary | None:
        config = self.config
        if config.rope_theta is None:
            return None
        grid = self.grid(pixel_values)
        rotary = rotary_positions(grid, config.head_width, config.rope_theta, pixel_values.device)
        return rotary if ids_keep is None else of_patches(rotary, ids_keep)

    def patch_tokens(self, last_hidden_state: Tensor) -> Tensor:
        """[n, patches, width]: the tokens without class token and registers."""
        return last_hidden_state[:, self.config.num_prefix_tokens :]

    def pool(self, last_hidden_state: Tensor) -> Tensor:
        """[n, width]: the class token, or the mean of the patch tokens, as config.pooling says."""
        if self.config.pooling == "mean":
            return self.patch_tokens(last_hidden_state).mean(dim=1)
        return last_hidden_state[:, 0]
