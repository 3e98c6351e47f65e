"""Every ViT of timm 1.0 by name, with the arguments that its code gives it and its tensors do not tell.

tests/interop/test_timm_architectures.py holds this table against the installed timm. Braces stand for several names.
"""

from __future__ import annotations

from typing import Any

from braceexpand import braceexpand

VIT, EVA = "VisionTransformer", "Eva"  # timm's classes
_EVA: dict[str, Any] = {"class": EVA}
_ROPE: dict[str, Any] = {"class": EVA, "use_rot_pos_emb": True}
_DINOV3: dict[str, Any] = _ROPE | {
    "eps": 1e-5,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "use_fc_norm": False,
}
_PE: dict[str, Any] = _ROPE | {"rope_grid_indexing": "xy", "use_pre_transformer_norm": True}
_ROWS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_heads": 2}, "test_vit"),
    ({"num_heads": 3}, "deit_tiny_patch16_224 vit_tiny_patch16_{224,384}"),
    ({"num_heads": 6},
     "deit3_small_patch16_{224,384} deit_small_patch16_224 flexivit_small vit_small_patch14_dinov2 "
     "vit_small_patch14_reg4_dinov2 vit_small_patch16_{224,384} vit_small_patch16_36x1_224 "
     "vit_small_patch32_{224,384} vit_small_patch8_224"),
    ({"num_heads": 8}, "deit3_medium_patch16_224"),
    ({"num_heads": 12},
     "deit3_base_patch16_{224,384} deit_base_patch16_{224,384} flexivit_base vit_base_patch14_dinov2 "
     "vit_base_patch14_reg1_tipsv2 vit_base_patch14_reg4_dinov2 vit_base_patch16_{224,384} "
     "vit_base_patch16_224_miil vit_base_patch32_{224,384} vit_base_patch8_224"),
    ({"num_heads": 14}, "vit_base_patch16_plus_240 vit_base_patch32_plus_256"),
    ({"num_heads": 16},
     "deit3_huge_patch14_224 deit3_large_patch16_{224,384} flexivit_large vit_giant_patch14_224 "
     "vit_gigantic_patch14_224 vit_huge_patch14_224 vit_large_patch14_224 vit_large_patch14_dinov2 "
     "vit_large_patch14_reg1_tipsv2 vit_large_patch14_reg4_dinov2 vit_large_patch16_{224,384} "
     "vit_large_patch32_{224,384} vit_so400m_patch14_reg1_tipsv2"),
    ({"num_heads": 24, "mlp_layer": "SwiGLUPacked"},
     "vit_giant_patch14_dinov2 vit_giant_patch14_reg1_tipsv2 vit_giant_patch14_reg4_dinov2"),
    ({"num_heads": 2, "global_pool": "avg"}, "test_vit2"),
    ({"num_heads": 4, "global_pool": "avg"}, "vit_wee_patch16_reg1_gap_256"),
    ({"num_heads": 5, "global_pool": "avg"}, "vit_little_patch16_reg1_gap_256 vit_little_patch16_reg4_gap_256"),
    ({"num_heads": 8, "fc_norm": False, "global_pool": "avg"}, "vit_medium_patch16_gap_{240,256,384}"),
    ({"num_heads": 8, "global_pool": "avg"},
     "vit_medium_patch16_reg1_gap_256 vit_medium_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_{256,384}"),
    ({"num_heads": 10, "fc_norm": False, "global_pool": "avg"}, "vit_betwixt_patch16_gap_256"),
    ({"num_heads": 10, "global_pool": "avg"},
     "vit_betwixt_patch16_reg1_gap_256 vit_betwixt_patch16_reg4_gap_{256,384}"),
    ({"num_heads": 12, "global_pool": "avg"}, "vit_base_patch16_reg4_gap_256"),
    ({"num_heads": 12, "fc_norm": False, "global_pool": "avg"}, "vit_base_patch16_siglip_gap_{224,256,384,512}"),
    ({"num_heads": 13, "global_pool": "avg"}, "vit_so150m2_patch16_reg1_gap_{256,384,448}"),
    ({"num_heads": 14, "fc_norm": False, "global_pool": "avg"}, "vit_so150m_patch16_reg4_gap_{256,384}"),
    ({"num_heads": 16, "global_pool": "avg"}, "eva_large_patch14_{196,336}"),
    ({"num_heads": 16, "fc_norm": False, "global_pool": "avg"},
     "vit_base_patch16_gap_224 vit_giant_patch16_gap_224 vit_huge_patch14_gap_224 vit_huge_patch16_gap_448 "
     "vit_large_patch16_siglip_gap_{256,384} vit_so400m_patch14_siglip_gap_{224,378,384,448,896}"),
    ({"num_heads": 12, "act_layer": "gelu_tanh", "fc_norm": False, "global_pool": "avg"},
     "vit_base_patch32_siglip_gap_256"),
    ({"num_heads": 16, "act_layer": "gelu_tanh", "fc_norm": False, "global_pool": "avg"},
     "vit_giantopt_patch16_siglip_gap_{256,384} vit_large_patch16_siglip_gap_512 "
     "vit_so400m_patch16_siglip_gap_{256,384,512}"),
    (_DINOV3 | {"num_heads": 3}, "vit_tiny_patch16_dinov3_qkvb"),
    (_DINOV3 | {"num_heads": 6}, "vit_small_patch16_dinov3 vit_small_patch16_dinov3_qkvb"),
    (_DINOV3 | {"num_heads": 6, "swiglu_align_to": 8},
     "vit_small_plus_patch16_dinov3 vit_small_plus_patch16_dinov3_qkvb"),
    (_DINOV3 | {"num_heads": 12}, "vit_base_patch16_dinov3 vit_base_patch16_dinov3_qkvb"),
    (_DINOV3 | {"num_heads": 16}, "vit_large_patch16_dinov3 vit_large_patch16_dinov3_qkvb"),
    (_DINOV3 | {"num_heads": 20, "swiglu_align_to": 8},
     "vit_huge_plus_patch16_dinov3 vit_huge_plus_patch16_dinov3_qkvb"),
    (_DINOV3 | {"num_heads": 32, "swiglu_align_to": 64}, "vit_7b_patch16_dinov3"),
    (_DINOV3 | {"num_heads": 6, "global_pool": "token"}, "vit_small_patch16_lingbot"),
    (_DINOV3 | {"num_heads": 12, "global_pool": "token"}, "vit_base_patch16_lingbot"),
    (_DINOV3 | {"num_heads": 16, "global_pool": "token"}, "vit_large_patch16_lingbot"),
    (_DINOV3 | {"num_heads": 24, "global_pool": "token", "swiglu_align_to": 8}, "vit_giant_patch16_lingbot"),
    # What no ViTConfig expresses, with what it is refused for.
    (_ROPE | {"attn_only_layer_scale": True, "norm_layer": "RmsNorm", "num_kv_heads": "by layer", "qkv_fused": False},
     "vit_5b_patch16_sapiens2 vit_base_patch16_sapiens2 vit_giant_patch16_sapiens2 vit_huge_patch16_sapiens2 "
     "vit_large_patch16_sapiens2"),
    (_PE | {"global_pool": "map", "rope_grid_offset": 1.0},
     "vit_pe_core_base_patch16_224 vit_pe_core_large_patch14_336 vit_pe_core_small_patch16_384 "
     "vit_pe_core_tiny_patch16_384"),
    (_PE | {"global_pool": "map"},
     "vit_pe_core_gigantic_patch14_448"),
    (_ROPE | {"qkv_fused": False, "scale_attn_inner": True, "scale_mlp": True},
     "eva02_base_patch16_clip_224 eva02_large_patch14_clip_{224,336}"),
    (_ROPE | {"qkv_fused": False, "scale_mlp": True}, "eva02_base_patch14_{224,448} eva02_large_patch14_{224,448}"),
    (_PE | {"rope_grid_offset": 1.0},
     "vit_pe_lang_large_patch14_448 vit_pe_spatial_base_patch16_512 vit_pe_spatial_large_patch14_448 "
     "vit_pe_spatial_small_patch16_512 vit_pe_spatial_tiny_patch16_512"),
    (_ROPE | {"global_pool": "token", "rope_grid_indexing": "xy"},
     "vit_base_patch16_rope_224 vit_base_patch16_rope_ape_224 vit_large_patch16_rope_224 "
     "vit_large_patch16_rope_ape_224 vit_small_patch16_rope_224 vit_small_patch16_rope_ape_224"),
    (_PE,
     "vit_pe_lang_gigantic_patch14_448 vit_pe_spatial_gigantic_patch14_448"),
    (_ROPE | {"global_pool": "token", "rope_grid_indexing": "xy", "rope_type": "mixed"},
     "vit_base_patch16_rope_mixed_224 vit_base_patch16_rope_mixed_ape_224 vit_large_patch16_rope_mixed_224 "
     "vit_large_patch16_rope_mixed_ape_224 vit_small_patch16_rope_mixed_224 vit_small_patch16_rope_mixed_ape_224"),
    (_ROPE,
     "eva02_small_patch14_{224,336} eva02_tiny_patch14_{224,336} vit_base_patch16_rope_reg1_gap_256 "
     "vit_betwixt_patch16_rope_reg4_gap_256 vit_medium_patch16_rope_reg1_gap_256 "
     "vit_mediumd_patch16_rope_reg1_gap_256"),
    (_EVA | {"use_post_norm": True}, "eva02_enormous_patch14_clip_224"),
    (_EVA, "eva_giant_patch14_{224,336,560} eva_giant_patch14_clip_224"),
    ({"act_layer": "quick_gelu", "eps": 1e-05, "pre_norm": True},
     "vit_base_patch16_clip_quickgelu_224 vit_base_patch32_clip_quickgelu_224 "
     "vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_{224,378} "
     "vit_large_patch14_clip_quickgelu_{224,336}"),
    ({"attn_layer": "diff"}, "vit_dlittle_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256"),
    ({"block_fn": "DiffParallelScalingBlock"}, "vit_dpwee_patch16_reg1_gap_256"),
    ({"block_fn": "ParallelScalingBlock", "norm_layer": "RmsNorm", "pre_norm": True},
     "vit_base_patch16_xp_224 vit_huge_patch14_xp_224 vit_large_patch14_xp_224"),
    ({"block_fn": "ParallelScalingBlock"}, "vit_pwee_patch16_reg1_gap_256"),
    ({"block_fn": "ParallelThingsBlock"}, "vit_base_patch16_18x2_224 vit_small_patch16_18x2_224"),
    ({"block_fn": "ResPostBlock"}, "vit_base_patch16_rpn_224"),
    ({"distilled": True},
     "deit_base_distilled_patch16_{224,384} deit_small_distilled_patch16_224 deit_tiny_distilled_patch16_224"),
    ({"embed_norm_layer": "RmsNorm", "mlp_layer": "SwiGLU", "norm_layer": "RmsNorm", "proj_bias": False},
     "aimv2_1b_patch14_{224,336,448} aimv2_3b_patch14_{224,336,448} aimv2_huge_patch14_{224,336,448} "
     "aimv2_large_patch14_{224,336,448}"),
    ({"final_norm": False},
     "vit_base_patch16_radio_v3 vit_giant_patch16_radio_v3 vit_huge_patch16_radio_v3 vit_huge_patch16_radio_v4 "
     "vit_intern300m_patch14_448 vit_large_patch16_radio_v3 vit_so400m_patch16_radio_v4"),
    ({"global_pool": "map", "pool_include_prefix": True}, "test_vit3"),
    ({"global_pool": "map"},
     "vit_base_patch16_siglip_{224,256,384,512} vit_base_patch32_siglip_256 "
     "vit_giantopt_patch16_siglip_{256,384} vit_large_patch16_siglip_{256,384,512} "
     "vit_so150m_patch16_reg4_map_256 vit_so400m_patch14_siglip_{224,378,384} "
     "vit_so400m_patch16_siglip_{256,384,512}"),
    ({"norm_layer": "rmsnorm"}, "test_vit4"),
    ({"eps": 1e-05, "pre_norm": True},
     "vit_base_patch16_clip_{224,384} vit_base_patch16_plus_clip_240 vit_base_patch32_clip_{224,256,384,448} "
     "vit_betwixt_patch32_clip_224 vit_giant_patch14_clip_224 vit_gigantic_patch14_clip_{224,378} "
     "vit_huge_patch14_clip_{224,336,378} vit_large_patch14_clip_{224,336} vit_medium_patch16_clip_224 "
     "vit_medium_patch32_clip_224 vit_xsmall_patch16_clip_224"),
    ({"scale_attn_norm": True, "scale_mlp_norm": True},
     "beit3_base_patch16_224 beit3_giant_patch14_{224,336} beit3_large_patch16_224"),
)  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: {"class": VIT} | arguments
    for arguments, names in _ROWS
    for word in names.split()
    for name in braceexpand(word)
}
