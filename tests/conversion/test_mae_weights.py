"""The MAE code's .pth files: what its models (rebuilt here of timm's blocks, as it does) give, ours give."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conversion.comparing import close, shaken
from tests.models.shapes import TINY
from vitscale.conversion.mae import write_mae
from vitscale.errors import CheckpointError, ConfigError, VitscaleError
from vitscale.interop.bare import read_bare
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.pretrained import processor_dict
from vitscale.interop.vision_transformer import Opened, state_of
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.positions import sincos_table
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

pytest.importorskip("timm")
from timm.models.vision_transformer import Block, PatchEmbed, VisionTransformer

NORM = partial(nn.LayerNorm, eps=1e-6)
HEADS = {"num_attention_heads": 2, "decoder_num_attention_heads": 4}
DECODER = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
DECODER |= {"decoder_intermediate_size": 36}  # MAE's code has one mlp_ratio, here 1.5


class MaskedAutoencoderViT(nn.Module):
    """models_mae.py at 32 pixels, its constructor's order; forward_loss and masking with the noise given."""

    def __init__(self, patch: int = 8, width: int = 32, decoder: int = 24, norm_pix_loss: bool = False) -> None:
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.patch_embed = PatchEmbed(32, patch, 3, width)
        patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_table(width, (32 // patch,) * 2), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, 2, 4.0, qkv_bias=True, norm_layer=NORM) for _ in range(2)])
        self.norm = NORM(width)
        self.decoder_embed = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder, (32 // patch,) * 2), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(decoder, 4, 4.0, qkv_bias=True, norm_layer=NORM) for _ in range(3)])
        self.decoder_norm = NORM(decoder)
        self.decoder_pred = nn.Linear(decoder, patch**2 * 3)
        assert patches == self.pos_embed.shape[1] - 1

    def forward(self, images: Tensor, noise: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        n, length, width = x.shape
        keep = int(length * (1 - mask_ratio))
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        x = torch.gather(x, 1, shuffle[:, :keep, None].repeat(1, 1, width))
        mask = torch.ones(n, length)
        mask[:, :keep] = 0
        mask = torch.gather(mask, 1, restore)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = self.mask_token.repeat(n, length - keep, 1)
        rest = torch.gather(torch.cat([x[:, 1:], tokens], dim=1), 1, restore[..., None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], rest], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predicted = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        p = self.patch_embed.patch_size[0]
        target = images.reshape(n, 3, 32 // p, p, 32 // p, p)
        target = torch.einsum("nchpwq->nhwpqc", target).reshape(n, length, p**2 * 3)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()
        return loss, predicted


def fine_tuned(global_pool: bool, classes: int = 5) -> nn.Module:
    """models_vit.py, whose tensors timm's own class has by the same names."""
    pooling = "avg" if global_pool else "token"
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=classes, global_pool=pooling,
        norm_layer=NORM,
    )  # fmt: skip


def save(model: nn.Module, path: Path, **beside: Any) -> Path:
    torch.save({"model": model.state_dict(), **beside}, path)
    return path


def images(model: ViTPreTrainedModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = model.config.image_size
    x = torch.randn(3, 3, side, side, generator=generator)  # type: ignore[arg-type]
    return x, torch.rand(3, model.config.num_patches, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_encoder_and_decoder(tmp_path: Path, norm_pix_loss: bool, positions: str) -> None:
    theirs = MaskedAutoencoderViT(norm_pix_loss=norm_pix_loss)
    if positions == "learned":
        theirs.requires_grad_(True)
    shaken(theirs)
    # As main_pretrain.py's save_model: the arguments are a Namespace, the rest plain numbers.
    arguments = argparse.Namespace(norm_pix_loss=norm_pix_loss, mask_ratio=0.75, gpu=0, model="mae_vit_base_patch16")
    optimizer = torch.optim.AdamW(theirs.parameters()).state_dict()
    path = save(theirs, tmp_path / "checkpoint-1.pth", epoch=1, optimizer=optimizer, scaler={}, args=arguments)
    opened = read_bare(path, HEADS)
    ours = opened.model
    assert isinstance(ours, ViTMAEForPreTraining)
    assert (ours.config.position_embeddings, ours.config.norm_pix_loss) == (positions, norm_pix_loss)
    assert opened.tensors == len(theirs.state_dict())
    assert opened.notes == ["the weights lie under 'model'"]
    x, noise = images(ours)
    loss, predicted = theirs(x, noise)
    found = ours(x, noise=noise)
    close(found.logits, predicted)
    close(found.loss, loss)

    left_out, notes = write_mae(tmp_path / "back.pth", opened)
    assert (left_out, notes) == ([], [])
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(back[name], value) or name.endswith("pos_embed"), name
    again = read_bare(tmp_path / "back.pth", {})  # ours say what MAE's leave open
    assert again.model.config == ours.config
    assert again.processor == opened.processor
    assert all(torch.equal(value, state_of(ours)[name]) for name, value in state_of(again.model).items())


@torch.no_grad()
@pytest.mark.parametrize("global_pool", [True, False])
def test_a_fine_tuned_one(tmp_path: Path, global_pool: bool) -> None:
    theirs = shaken(fine_tuned(global_pool))
    assert ("fc_norm.weight" in theirs.state_dict()) == global_pool
    opened = read_bare(save(theirs, tmp_path / "mae_finetuned.pth"), {"num_attention_heads": 2})
    ours = opened.model
    assert isinstance(ours, ViTForImageClassification)
    assert (ours.config.fc_norm, ours.config.pooling) == ((True, "mean") if global_pool else (False, "cls"))
    x, _ = images(ours)
    close(ours(x).logits, theirs(x))
    write_mae(tmp_path / "back.pth", opened)
    fresh = fine_tuned(global_pool)
    fresh.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True)["model"])
    close(fresh.eval()(x), theirs(x))


@torch.no_grad()
def test_the_published_pretrained_ones_are_encoders_alone(tmp_path: Path) -> None:
    theirs = shaken(fine_tuned(False, classes=0))
    opened = read_bare(save(theirs, tmp_path / "mae_pretrain.pth"), {"num_attention_heads": 2})
    assert isinstance(opened.model, ViTModel)
    assert opened.model.pooler is None
    x, _ = images(opened.model)
    close(opened.model(x).last_hidden_state, theirs.forward_features(x))
    write_mae(tmp_path / "back.pth", opened)
    assert torch.load(tmp_path / "back.pth", weights_only=True)["model"].keys() == theirs.state_dict().keys()


def test_a_state_dict_alone_and_widths_of_mae(tmp_path: Path) -> None:
    """Heads of MAE's own sizes are known; a file may be the state dict itself."""
    config = ViTConfig(hidden_size=768, num_hidden_layers=1, image_size=32, patch_size=16, layer_norm_eps=1e-6)
    model = ViTModel(config, add_pooling_layer=False)
    initialize(model, 0)
    opened = Opened("hf", model, ViTImageProcessor(size=32), 0)
    write_mae(tmp_path / "a.pth", opened)
    torch.save(torch.load(tmp_path / "a.pth", weights_only=True)["model"], tmp_path / "b.pth")
    assert read_bare(tmp_path / "b.pth", {}).model.config.num_attention_heads == 12


def test_what_a_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    path = save(MaskedAutoencoderViT(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"^num_attention_heads: .*width 32.*give num_attention_heads=N"):
        read_bare(path, {})
    with pytest.raises(ConfigError, match=r"^decoder_num_attention_heads: .*width 24"):
        read_bare(path, {"num_attention_heads": 2})
    with pytest.raises(ConfigError, match=r"hidden_size=3: .*leaves open no more than"):
        read_bare(path, {**HEADS, "hidden_size": 3})
    with pytest.raises(ConfigError, match=r"image_size=64: .*16 patches"):
        read_bare(path, {**HEADS, "image_size": 64})
    assert "norm_pix_loss" in read_bare(path, HEADS).notes[1]
    assert len(read_bare(path, {**HEADS, "norm_pix_loss": True}).notes) == 1
    other = VisionTransformer(img_size=(16, 40), patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    path = save(other, tmp_path / "b.pth")
    with pytest.raises(ConfigError, match="10 patches, no square; give image_size"):
        read_bare(path, {"num_attention_heads": 2})
    with pytest.raises(ConfigError, match=r"decoder_num_attention_heads=4: .*no more than num_attention_heads, image_"):
        read_bare(path, HEADS)
    assert read_bare(path, {"num_attention_heads": 2, "image_size": (16, 40)}).model.config.image_size == (16, 40)


@pytest.mark.parametrize("said", ["given", "note"])
@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        *(("image_size", value, "a whole number or a list of 2") for value in ("abc", (32,), (32, 32, 32), None, {})),
        ("image_size", 20, "a multiple of patch_size=8|.*16 patches of 8; give image_size=H,W"),
        ("image_size", (64, 32), ".*16 patches of 8; give image_size=H,W"),
        ("num_attention_heads", 2.0, "a whole number"),
        ("num_attention_heads", 0, "1 or more"),
        ("decoder_num_attention_heads", "4", "a whole number"),
        ("norm_pix_loss", "maybe", "true or false"),
    ],
)
def test_a_value_that_is_none_is_named(tmp_path: Path, said: str, key: str, value: Any, rule: str) -> None:
    note = {"vitscale": HEADS | {key: value}} if said == "note" else {}
    path = save(MaskedAutoencoderViT(), tmp_path / "a.pth", **note)
    with pytest.raises(VitscaleError, match=rf"{key}={re.escape(repr(value))}: (must be )?({rule})") as error:
        read_bare(path, HEADS | {key: value} if said == "given" else {})
    assert "a.pth" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mask_ratio", 7, r"mask_ratio=7.0: must be in \[0, 1\)"),
        ("mask_ratio", -7, r"mask_ratio=-7.0: must be in \[0, 1\)"),
        ("processor", {"image_mean": ["a"]}, "its note on images: image_mean="),
        ("processor", {"do_pad": True}, r"its note on images: key\(s\) do_pad"),
    ],
)
def test_a_note_of_ours_that_was_edited(tmp_path: Path, key: str, value: Any, said: str) -> None:
    path = save(MaskedAutoencoderViT(), tmp_path / "a.pth", vitscale=HEADS | {key: value})
    with pytest.raises(CheckpointError, match=f"a.pth: {said}"):
        read_bare(path, {})


def test_names_of_more_classes_than_rows(tmp_path: Path) -> None:
    note = {"num_attention_heads": 2, "id2label": {0: "cat", 1: "dog"}}
    path = save(fine_tuned(False), tmp_path / "a.pth", vitscale=note)
    with pytest.raises(CheckpointError, match="id2label of 2 names, and its head 5 rows"):
        read_bare(path, {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tables are told from learned positions, and computed anew; both sides agree on the rest."""
    theirs = shaken(MaskedAutoencoderViT())
    halves = {name: value.to(dtype) for name, value in theirs.state_dict().items()}
    torch.save({"model": halves}, tmp_path / "a.pth")
    opened = read_bare(tmp_path / "a.pth", HEADS)
    assert opened.model.config.position_embeddings == "sincos"
    assert f"pos_embed: MAE's table, of {dtype}" in opened.notes[2]
    assert torch.equal(state_of(opened.model)["vit.embeddings.position_embeddings"], theirs.pos_embed)
    halves["pos_embed"] = halves["pos_embed"] + 0.05
    torch.save({"model": halves}, tmp_path / "b.pth")
    assert read_bare(tmp_path / "b.pth", HEADS).model.config.position_embeddings == "learned"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("print('this must never run')",))


def test_what_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(MaskedAutoencoderViT(), tmp_path / "a.pth", args=argparse.Namespace(output_dir=Evil()))
    with pytest.raises(CheckpointError, match=r"asks for exec, which could run anything"):
        read_bare(path, HEADS)
    assert "never" not in capsys.readouterr().out
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # let in for this file alone


def test_broken_files_and_other_tensors(tmp_path: Path) -> None:
    theirs = MaskedAutoencoderViT()
    path = save(theirs, tmp_path / "a.pth")
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cut.pth: cannot be read as PyTorch's pickle"):
        read_bare(tmp_path / "cut.pth", HEADS)
    torch.save({"epoch": 3, "weights": {}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"must hold a Vision Transformer.*it holds epoch, weights"):
        read_bare(tmp_path / "b.pth", HEADS)
    state = theirs.state_dict()
    for change, expected in (
        ({"head_dist.weight": torch.zeros(5, 32)}, "head_dist.weight are of DeiT's distillation token"),
        ({"decoder_pred.bias": None}, "missing: decoder_pred.bias"),
        ({"pos_embed": None}, "missing: pos_embed"),
        ({"norm.bias": torch.zeros(3)}, r"of another shape: norm.bias \[3\]"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3)}, r"patch_embed.proj.weight \[32, 3\] instead of 4 dimensions"),
        ({"pos_embed": torch.zeros(16)}, r"pos_embed \[16\] instead of 3 dimensions"),
        ({"decoder_pos_embed": torch.zeros(())}, r"decoder_pos_embed \[\] instead of 3 dimensions"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(())}, r"blocks.0.mlp.fc1.weight \[\] instead of 2 dimensions"),
        ({"blocks.99999999999.norm1.bias": torch.zeros(32)}, "unexpected: blocks.99999999999.norm1.bias"),
        ({"decoder_pos_embed": torch.zeros(1, 5, 24)}, r"of another shape: decoder_pos_embed \[1, 5, 24\]"),
    ):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        torch.save({"model": changed}, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match=expected):
            read_bare(tmp_path / "c.pth", HEADS)


def ours(model_class: type[ViTPreTrainedModel], **keys: Any) -> Opened:
    more = DECODER if model_class.config_class is ViTMAEConfig else {"encoder_stride": 4}
    config = model_class.config_class(**TINY | more | {"layer_norm_eps": 1e-6} | keys)
    model = model_class(config)
    initialize(model, 0)
    return Opened("hf", model.eval(), ViTImageProcessor.from_dict(processor_dict(config, (0.5,), (0.5,))), 0)


@pytest.mark.parametrize(
    ("model_class", "keys", "reason"),
    [
        (ViTForImageClassification, {"num_register_tokens": 2}, "num_register_tokens=2"),
        (ViTForImageClassification, {"pooling": "mean"}, "pooling='mean' with fc_norm=False"),
        (ViTForImageClassification, {"qkv_bias": False, "hidden_act": "relu"}, "qkv_bias=False, hidden_act='relu'"),
        (ViTForImageClassification, {"image_size": (16, 24)}, r"image_size=\(16, 24\) \(no square\)"),
        (ViTMAEForPreTraining, {"num_channels": 4}, "num_channels=4"),
        (ViTMAEForPreTraining, {"decoder_intermediate_size": 24}, "one mlp_ratio"),
        (ViTMAEForPreTraining, {"layer_scale_init_value": 0.1}, "layer_scale_init_value=0.1"),
    ],
)
def test_what_mae_cannot_express_is_refused(
    tmp_path: Path, model_class: type[ViTPreTrainedModel], keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*MAE's code cannot express it"):
        write_mae(tmp_path / "a.pth", ours(model_class, **keys))
    assert not (tmp_path / "a.pth").exists()


def test_a_mask_token_and_a_pooler_stay_out(tmp_path: Path) -> None:
    left_out, _ = write_mae(tmp_path / "a.pth", ours(ViTModel))
    assert left_out == ["vit.pooler.dense.weight", "vit.pooler.dense.bias"]
    _, notes = write_mae(tmp_path / "b.pth", ours(ViTMAEForPreTraining, layer_norm_eps=1e-12))
    assert notes == ["layer_norm_eps=1e-12 became 1e-06: MAE's code has no other"]
