"""Every option against the model that it comes from, on copied weights: DINOv2, DINOv3 and timm's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models.shapes import EVERY_OPTION, OPTION_SETS, TINY, inputs, tiny
from vitscale.models.attention import ViTSelfAttention
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.positions import rotary_positions, rotate
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTMLP, ViTModel, ViTPreTrainedModel

every_option = pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())


def shaken(module: nn.Module) -> nn.Module:
    """With every parameter far from where it starts: a norm or scale left out would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


# Names of transformers' DINOv2 and DINOv3 on ours; what is a list is one below the other here.
BLOCK = {
    "layernorm_before": ["norm1"], "layernorm_after": ["norm2"], "attention.output": ["attention.o_proj"],
    "attention.attention.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
}  # fmt: skip


def block_from(theirs: nn.Module, fc1: list[str], fc2: str) -> dict[str, Tensor]:
    state = theirs.state_dict()
    copied = {"layer_scale_before": state["layer_scale1.lambda1"], "layer_scale_after": state["layer_scale2.lambda1"]}
    for name, sources in {**BLOCK, "mlp.fc1": fc1, "mlp.fc2": [fc2]}.items():
        for kind in ("weight", "bias"):
            copied[f"{name}.{kind}"] = torch.cat([state[f"{source}.{kind}"] for source in sources])
    return copied


def dino_from(ours: ViTModel, theirs: nn.Module, blocks: nn.ModuleList, projection: nn.Module, norm: nn.Module,
              fc1: list[str], fc2: str) -> None:  # fmt: skip
    embeddings = theirs.embeddings
    copied = {
        "embeddings.cls_token": embeddings.cls_token,
        "embeddings.register_tokens": embeddings.register_tokens,
        "embeddings.patch_embeddings.projection.weight": projection.weight,
        "embeddings.patch_embeddings.projection.bias": projection.bias,
        "layernorm.weight": norm.weight,
        "layernorm.bias": norm.bias,
    }
    if hasattr(embeddings, "position_embeddings"):
        copied["embeddings.position_embeddings"] = embeddings.position_embeddings
    for number, block in enumerate(blocks):
        parts = block_from(block, fc1, fc2)
        copied |= {f"encoder.layers.{number}.{name}": value for name, value in parts.items()}
    ours.load_state_dict(copied)


GATED, PLAIN = (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"), (["mlp.up_proj"], "mlp.down_proj")


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("image_size", [16, (8, 24)])
def test_rotary_positions_registers_and_scales_are_dinov3s(swiglu: bool, image_size: Any) -> None:
    theirs = shaken(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        **TINY | {"image_size": image_size}, num_register_tokens=3, use_gated_mlp=swiglu, key_bias=True,
        hidden_act="silu" if swiglu else "gelu", layer_norm_eps=1e-5, rope_theta=50.0,
    )))  # fmt: skip
    ours = ViTModel(
        ViTConfig(**TINY | {"image_size": image_size}, num_register_tokens=3, swiglu=swiglu, layer_norm_eps=1e-5,
                  rope_theta=50.0, layer_scale_init_value=1.0, position_embeddings="none"),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    mlp = GATED if swiglu else PLAIN
    dino_from(ours, theirs, theirs.model.layer, theirs.embeddings.patch_embeddings, theirs.norm, *mlp)
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    for size in ((height, width), (24, 12)):
        pixels = torch.randn(2, 3, *size)
        expected = theirs(pixels).last_hidden_state
        for attentions in (False, True):
            found = ours(pixels, interpolate_pos_encoding=True, output_attentions=attentions)
            assert torch.allclose(found.last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("swiglu", [True, False])
def test_registers_scales_and_swiglu_are_dinov2s(swiglu: bool) -> None:
    keys = {name: value for name, value in TINY.items() if name != "intermediate_size"}
    theirs = shaken(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        **keys, mlp_ratio=2, use_swiglu_ffn=swiglu, num_register_tokens=4
    )))  # fmt: skip
    hidden = theirs.encoder.layer[0].mlp.gate_proj.out_features if swiglu else 32
    ours = ViTModel(
        ViTConfig(**keys, intermediate_size=hidden, num_register_tokens=4, swiglu=swiglu, layer_norm_eps=1e-6,
                  layer_scale_init_value=1.0),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    mlp = GATED if swiglu else (["mlp.fc1"], "mlp.fc2")
    projection = theirs.embeddings.patch_embeddings.projection
    dino_from(ours, theirs, theirs.encoder.layer, projection, theirs.layernorm, *mlp)
    pixels = torch.randn(2, 3, 16, 16)
    found, expected = ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state
    assert found.shape == (2, 1 + 4 + 16, 16)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_rotation_is_that_of_transformers() -> None:
    from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs

    query, key = torch.randn(2, 2, 3, 2 + 15, 12).unbind(0)
    config = transformers.DINOv3ViTConfig(hidden_size=36, num_attention_heads=3, patch_size=4, rope_theta=30.0)
    cos, sin = theirs.DINOv3ViTRopePositionEmbedding(config).eval()(torch.empty(1, 3, 12, 20))
    found = rotary_positions((3, 5), 12, 30.0, query.device)
    assert torch.allclose(found[0][0, 0], cos, atol=1e-6)
    assert torch.allclose(found[1][0, 0], sin, atol=1e-6)
    expected = theirs.apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.allclose(rotate(query, found), expected[0], atol=1e-6)
    assert torch.allclose(rotate(key, found), expected[1], atol=1e-6)


@pytest.mark.parametrize("output_attentions", [False, True])
def test_qk_norm_is_timms(output_attentions: bool) -> None:
    from timm.layers.attention import Attention

    theirs = shaken(Attention(16, 2, qkv_bias=True, qk_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    ours = ViTSelfAttention(ViTConfig(**TINY, qk_norm=True, layer_norm_eps=1e-6)).eval()
    names = {"q_norm": "query_norm", "k_norm": "key_norm", "qkv": "qkv"}
    state = {}
    for name, value in theirs.state_dict().items():
        module, kind = name.split(".")
        if module in names:
            state[f"{names[module]}.{kind}"] = value
    ours.load_state_dict(state)
    x = torch.randn(3, 7, 16)
    context, weights = ours(x, output_attentions=output_attentions)
    assert torch.allclose(theirs.proj(context), theirs(x), atol=1e-5)
    assert (weights is not None) == output_attentions


def test_swiglu_is_timms() -> None:
    from timm.layers import SwiGLUPacked

    theirs = shaken(SwiGLUPacked(16, hidden_features=48))
    ours = ViTMLP(ViTConfig(**TINY, swiglu=True))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize(("options", "theirs"), [
    ({"pooling": "mean", "fc_norm": True}, {"global_pool": "avg"}),
    ({"pooling": "mean"}, {"global_pool": "avg", "fc_norm": False}),
    ({"fc_norm": True}, {"global_pool": "token", "fc_norm": True}),
    ({"pooling": "mean", "use_cls_token": False, "layer_scale_init_value": 0.1, "qk_norm": True},
     {"global_pool": "avg", "fc_norm": False, "class_token": False, "init_values": 0.1, "qk_norm": True}),
])  # fmt: skip
def test_pooling_and_last_norm_are_timms(options: dict[str, Any], theirs: dict[str, Any]) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = shaken(VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, mlp_ratio=1.5, num_classes=5, **theirs
    ))  # fmt: skip
    ours = tiny(ViTForImageClassification, **options, layer_norm_eps=1e-6).eval()
    ours.load_state_dict(from_timm(model.state_dict()))
    pixels = torch.randn(4, 3, 16, 16)
    assert torch.allclose(ours(pixels).logits, model(pixels), atol=1e-5, rtol=1e-5)


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = (
        ("cls_token", "vit.embeddings.cls_token"), ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"), ("blocks.", "vit.encoder.layers."),
        (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".ls1.gamma", ".layer_scale_before"),
        (".ls2.gamma", ".layer_scale_after"), (".attn.qkv.", ".attention.attention.qkv."),
        (".attn.q_norm.", ".attention.attention.query_norm."), (".attn.k_norm.", ".attention.attention.key_norm."),
        (".attn.proj.", ".attention.output."), ("head.", "classifier."),
    )  # fmt: skip
    copied = {}
    for name, value in state.items():
        if name.startswith("norm."):
            name = f"vit.layer{name}"
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        copied[name] = value
    return copied


@every_option
def test_patches_kept_know_where_they_were(options: dict[str, Any]) -> None:
    """All patches, kept in another order: every token is what it is in its own place."""
    model = tiny(ViTModel, **options).eval()
    shaken(model)
    pixels = torch.randn(3, 3, 16, 16)
    ids_keep = torch.stack([torch.randperm(16) for _ in range(3)])
    expected = model.patch_tokens(model(pixels).last_hidden_state)
    found = model.patch_tokens(model(pixels, ids_keep=ids_keep).last_hidden_state)
    places = ids_keep[..., None].expand(-1, -1, 16)
    assert torch.allclose(found, expected.gather(1, places), atol=1e-5)
    # And where a patch is matters: in the order of the image they would not be the same.
    moved = model(pixels[:, :, torch.arange(15, -1, -1)]).last_hidden_state
    assert not torch.allclose(model.pool(moved), model.pool(model(pixels).last_hidden_state), atol=1e-3)


@every_option
def test_an_autoencoder_sees_only_what_is_visible(options: dict[str, Any]) -> None:
    model = tiny(ViTMAEForPreTraining, mask_ratio=0.5, **options).eval()
    shaken(model)
    batch = inputs(model)
    output = model(**batch)
    hidden = output.mask[..., None].bool()
    patches = model.patchify(batch["pixel_values"])
    other = model.unpatchify(torch.where(hidden, torch.randn_like(patches), patches))
    assert torch.allclose(model(other, sample_key=batch["sample_key"]).logits, output.logits, atol=1e-6)
    visible = model.unpatchify(torch.where(hidden, patches, torch.randn_like(patches)))
    assert not torch.allclose(model(visible, sample_key=batch["sample_key"]).logits, output.logits, atol=1e-2)
    # What is predicted differs from one hidden patch to the next: the decoder knows where they are.
    predicted = output.logits[0][output.mask[0] == 1]
    assert (predicted[0] - predicted[1]).abs().max() > 1e-3


@every_option
@pytest.mark.parametrize("channels", [1, 4, 9, 13])
@pytest.mark.parametrize("model_class", [ViTMAEForPreTraining, ViTForMaskedImageModeling, ViTForMultitaskPreTraining])
def test_any_channels_shape_and_patch(
    model_class: type[ViTPreTrainedModel], channels: int, options: dict[str, Any]
) -> None:
    """Images of 16 x 24 in patches of 4 x 6: what a model predicts lies where its target does."""
    keys: dict[str, Any] = {"num_channels": channels, "image_size": (16, 24), "patch_size": (4, 6)}
    if model_class is not ViTMAEForPreTraining:
        keys |= {"encoder_stride": (4, 6), "mask_patch": 2}
    model = tiny(model_class, **keys, **options)
    batch = inputs(model, n=4)
    output = model(**batch)
    assert torch.isfinite(output.loss)
    for size in ((16, 24), (8, 36)):
        pixels = torch.randn(2, channels, *size)
        more = {"sample_key": batch["sample_key"][:2], "interpolate_pos_encoding": True}
        if model_class is ViTForMultitaskPreTraining:
            more["labels"] = batch["labels"][:2]
        seen = model(pixels, **more)
        shape = (2, size[0] * size[1] // 24, 24 * channels) if model_class is ViTMAEForPreTraining else pixels.shape
        assert (seen.logits if model_class is ViTMAEForPreTraining else seen.reconstruction).shape == shape


def test_decoder_puts_pixels_as_torchs_pixel_shuffle_does() -> None:
    model = tiny(ViTForMaskedImageModeling)
    features = torch.randn(2, 48, 3, 5)
    assert torch.equal(model.decoder[1](features), nn.PixelShuffle(4)(features))
    flat = tiny(ViTForMaskedImageModeling, image_size=(16, 24), patch_size=(4, 6), encoder_stride=(4, 6))
    tokens = torch.zeros(1, 1 + 16, 16)
    with torch.no_grad():
        images = flat.decode(tokens, torch.empty(1, 3, 16, 24))
        tokens[:, 1 + 6] += 1  # row 1, column 2
        changed = (flat.decode(tokens, torch.empty(1, 3, 16, 24)) != images).any(1)[0].nonzero()
    assert changed.min(0).values.tolist() == [4, 12]
    assert changed.max(0).values.tolist() == [7, 17]


def test_pooling_leaves_out_what_is_no_patch() -> None:
    model = tiny(ViTModel, num_register_tokens=2, pooling="mean").eval()
    tokens = torch.randn(2, 1 + 2 + 16, 16)
    assert torch.equal(model.pool(tokens), tokens[:, 3:].mean(1))
    assert torch.equal(model.patch_tokens(tokens), tokens[:, 3:])
    assert torch.equal(tiny(ViTModel).pool(tokens), tokens[:, 0])
    pixels = torch.randn(2, 3, 16, 16)
    output = model(pixels)
    expected = model.pooler.activation(model.pooler.dense(output.last_hidden_state[:, 3:].mean(1)))
    assert torch.equal(output.pooler_output, expected)


def test_layer_scale_starts_where_the_config_says() -> None:
    model = tiny(ViTForImageClassification, **EVERY_OPTION)
    for layer in model.vit.encoder.layers:
        assert (layer.layer_scale_before == 0.5).all()
        assert (layer.layer_scale_after == 0.5).all()
        assert layer.layer_scale_before is not layer.layer_scale_after
    assert 0.01 < model.vit.embeddings.register_tokens.std() < 0.03
