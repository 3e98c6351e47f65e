"""Our parameter names and those of timm's VisionTransformer, which MAE and DINO share, as tables."""

from __future__ import annotations

import re

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what both usually normalize by

_MODULES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.register_tokens": "reg_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "fc_norm": "fc_norm",
    "classifier": "head",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
_BLOCKS = {"vit.encoder.layers": "blocks", "decoder.transformer.layers": "decoder_blocks"}
_IN_BLOCK = {
    "layernorm_before": "norm1",
    "attention.attention.qkv": "attn.qkv",
    "attention.attention.query_norm": "attn.q_norm",
    "attention.attention.key_norm": "attn.k_norm",
    "attention.output": "attn.proj",
    "layer_scale_before": "ls1.gamma",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale_after": "ls2.gamma",
}
_BLOCK = re.compile(rf"({'|'.join(map(re.escape, _BLOCKS))})\.(\d+)\.(.+)")


def timm_name(ours: str) -> str | None:
    """timm's and MAE's name of a parameter of ours (those of a bare ViTModel with `vit.` before); None: no place."""
    path, dot, leaf = ours.rpartition(".")
    if leaf not in ("weight", "bias"):
        path, dot, leaf = ours, "", ""
    block = _BLOCK.fullmatch(path)
    if block is None:
        name = _MODULES.get(path)
    else:
        within = _IN_BLOCK.get(block[3])
        name = within and f"{_BLOCKS[block[1]]}.{block[2]}.{within}"
    return name and f"{name}{dot}{leaf}"
