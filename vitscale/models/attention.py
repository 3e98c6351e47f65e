"""Self-attention: one matrix for query, key and value, and torch's fused kernels wherever they will do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.models.configuration import ViTConfig
from vitscale.models.positions import Rotary, rotate


class ViTSelfAttention(nn.Module):
    """softmax(q k' / sqrt(d)) v in every head, over one matrix for query, key and value."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.in_float32 = False  # by attend_in_float32
        self.qkv = nn.Linear(config.hidden_size, 3 * config.attention_width, bias=config.qkv_bias)
        width, eps = config.head_width, config.layer_norm_eps
        self.query_norm = nn.LayerNorm(width, eps=eps) if config.qk_norm else None
        self.key_norm = nn.LayerNorm(width, eps=eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`x`: [n, tokens, width]; gives the same shape, and [n, heads, tokens, tokens] where asked."""
        n, tokens = x.shape[:2]
        qkv = self.qkv(x).view(n, tokens, 3, self.num_attention_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, tokens, head's width]
        if self.query_norm is not None and self.key_norm is not None:
            # Under autocast a layer norm gives float32.
            query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions:  # the fused kernels do not give the weights
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
            context = weights @ value
        elif self.in_float32:
            with torch.autocast(x.device.type, enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).to(qkv.dtype)
        else:
            context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return context.transpose(1, 2).flatten(2), weights


def attend_in_float32(model: nn.Module) -> None:
    """Let every attention of a bf16 model be computed in fp32: on a CPU the backward of torch's fused kernel takes 1.4
    to 6 times as long in bf16 (torch 2.13)."""
    for module in model.modules():
        if isinstance(module, ViTSelfAttention):
            module.in_float32 = True


class ViTAttention(nn.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = ViTSelfAttention(config)
        self.output = nn.Linear(config.attention_width, config.hidden_size)

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = self.attention(x, rotary, output_attentions)
        return self.output(context), weights
