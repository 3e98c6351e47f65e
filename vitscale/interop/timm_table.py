"""The ViTs of timm 1.0 that a ViTConfig can express, with the arguments that timm's code gives them and tensors do not
tell.

tests/interop/test_timm_architectures.py holds this table against the installed timm. Braces stand for several names.
"""

from __future__ import annotations

from typing import Any

from braceexpand import braceexpand

VIT, EVA = "VisionTransformer", "Eva"  # timm's classes
_ROPE: dict[str, Any] = {"class": EVA, "use_rot_pos_emb": True}
_DINOV3: dict[str, Any] = _ROPE | {
    "eps": 1e-5,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "use_fc_norm": False,
}
_ROWS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_heads": 2}, "test_vit"),
    ({"num_heads": 3}, "deit_tiny_patch16_224 vit_tiny_patch16_{224,384}"),
    ({"num_heads": 6},
     "deit3_small_patch16_{224,384} deit_small_patch16_224 flexivit_small vit_small_patch14_{dinov2,reg4_dinov2} "
     "vit_small_patch16_{224,384,36x1_224} vit_small_patch32_{224,384} vit_small_patch8_224"),
    ({"num_heads": 8}, "deit3_medium_patch16_224"),
    ({"num_heads": 12},
     "deit{,3}_base_patch16_{224,384} flexivit_base vit_base_patch14_{dinov2,reg1_tipsv2,reg4_dinov2} "
     "vit_base_patch16_{224,224_miil,384} vit_base_patch32_{224,384} vit_base_patch8_224"),
    ({"num_heads": 14}, "vit_base_patch16_plus_240 vit_base_patch32_plus_256"),
    ({"num_heads": 16},
     "deit3_huge_patch14_224 deit3_large_patch16_{224,384} flexivit_large vit_{giant,gigantic,huge,large}_patch14_224 "
     "vit_large_patch14_{dinov2,reg1_tipsv2,reg4_dinov2} vit_large_patch{16,32}_{224,384} "
     "vit_so400m_patch14_reg1_tipsv2"),
    ({"num_heads": 24, "mlp_layer": "SwiGLUPacked"}, "vit_giant_patch14_{dinov2,reg1_tipsv2,reg4_dinov2}"),
    ({"num_heads": 2, "global_pool": "avg"}, "test_vit2"),
    ({"num_heads": 4, "global_pool": "avg"}, "vit_wee_patch16_reg1_gap_256"),
    ({"num_heads": 5, "global_pool": "avg"}, "vit_little_patch16_reg{1,4}_gap_256"),
    ({"num_heads": 8, "fc_norm": False, "global_pool": "avg"}, "vit_medium_patch16_gap_{240,256,384}"),
    ({"num_heads": 8, "global_pool": "avg"},
     "vit_medium_patch16_reg{1,4}_gap_256 vit_mediumd_patch16_reg4_gap_{256,384}"),
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
    (_DINOV3 | {"num_heads": 6}, "vit_small_patch16_dinov3{,_qkvb}"),
    (_DINOV3 | {"num_heads": 6, "swiglu_align_to": 8}, "vit_small_plus_patch16_dinov3{,_qkvb}"),
    (_DINOV3 | {"num_heads": 12}, "vit_base_patch16_dinov3{,_qkvb}"),
    (_DINOV3 | {"num_heads": 16}, "vit_large_patch16_dinov3{,_qkvb}"),
    (_DINOV3 | {"num_heads": 20, "swiglu_align_to": 8}, "vit_huge_plus_patch16_dinov3{,_qkvb}"),
    (_DINOV3 | {"num_heads": 32, "swiglu_align_to": 64}, "vit_7b_patch16_dinov3"),
    (_DINOV3 | {"num_heads": 6, "global_pool": "token"}, "vit_small_patch16_lingbot"),
    (_DINOV3 | {"num_heads": 12, "global_pool": "token"}, "vit_base_patch16_lingbot"),
    (_DINOV3 | {"num_heads": 16, "global_pool": "token"}, "vit_large_patch16_lingbot"),
    (_DINOV3 | {"num_heads": 24, "global_pool": "token", "swiglu_align_to": 8}, "vit_giant_patch16_lingbot"),
    # What no ViTConfig expresses, of which many ask, or which timm.py starts from to write a model.
    (_ROPE | {"global_pool": "token", "rope_grid_indexing": "xy"},
     "vit_{base,large,small}_patch16_rope_{224,ape_224}"),
    ({"eps": 1e-05, "pre_norm": True},
     "vit_base_patch16_clip_{224,384} vit_base_patch16_plus_clip_240 vit_base_patch32_clip_{224,256,384,448} "
     "vit_betwixt_patch32_clip_224 vit_giant_patch14_clip_224 vit_gigantic_patch14_clip_{224,378} "
     "vit_huge_patch14_clip_{224,336,378} vit_large_patch14_clip_{224,336} vit_medium_patch{16,32}_clip_224 "
     "vit_xsmall_patch16_clip_224"),
    ({"global_pool": "map"},
     "vit_base_patch16_siglip_{224,256,384,512} vit_base_patch32_siglip_256 "
     "vit_giantopt_patch16_siglip_{256,384} vit_large_patch16_siglip_{256,384,512} "
     "vit_so150m_patch16_reg4_map_256 vit_so400m_patch14_siglip_{224,378,384} "
     "vit_so400m_patch16_siglip_{256,384,512}"),
    ({"distilled": True},
     "deit_base_distilled_patch16_{224,384} deit_{small,tiny}_distilled_patch16_224"),
)  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: {"class": VIT} | arguments
    for arguments, names in _ROWS
    for word in names.split()
    for name in braceexpand(word)
}
