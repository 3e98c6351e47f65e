"""The model of a bare file of weights: its sizes from the tensors, the rest from what published models have.

Such files (of MAE, DINO, DINOv2, DINOv3, SimMIM, timm, or transformers without its config.json) hold tensors and seldom
more: what they do not say is taken from the published models of that width, and noted, or has to be given.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.config.model_rules import pair
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.checkpoints import DINOV3_ANCHOR, HF_ANCHORS, TIMM_ANCHOR, read_checkpoint
from vitscale.interop.dialects import plain_names, rope_theta
from vitscale.interop.image_processing import ViTImageProcessor, processor_for
from vitscale.interop.strict import refuse_foreign
from vitscale.interop.timm_names import IMAGENET_MEAN, IMAGENET_STD
from vitscale.interop.vision_transformer import Opened, build, depth, fold_positions, require, sizes
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.positions import is_table, sincos_table
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.text import listed

EPS = 1e-6  # of every layer norm in MAE, DINO, DINOv2, SimMIM and timm
_EPS_OF_ROTARY, _EPS_OF_TRANSFORMERS = 1e-5, 1e-12  # DINOv3's; ViTConfig's in transformers
# Heads by width, of the models that MAE, DeiT, DINO, DINOv2, MSN and I-JEPA published.
_HEADS, _DECODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}, {512: 16}
_HEADS_OF_ROTARY = {**_HEADS, 1280: 20, 4096: 32}  # DINOv3's, where the periods of its positions do not tell
_THETA = 100.0  # of DINOv3
_DEFAULT_SIZE = 224  # pixels, where a model has no positions that tell
# What a file may leave open, and a caller may say.
_KEYS_OF_ENCODER = ("num_attention_heads", "image_size", "layer_norm_eps", "rope_theta")
KEYS = (*_KEYS_OF_ENCODER, "decoder_num_attention_heads", "norm_pix_loss")
WRITTEN = "vitscale"  # where our files say what MAE's do not
_MASK_TOKEN = "vit.embeddings.mask_token"


def read_bare(
    path: Path, options: Mapping[str, Any], take: str | None = None, defaults: Mapping[str, Any] | None = None
) -> Opened:
    """The model of a file of weights: a ViTMAEForPreTraining, ViTForMaskedImageModeling or ViTForImageClassification
    if it has such a head, else a ViTModel.

    options: what the file leaves open, of KEYS; defaults: the same, for where the file itself does not say; take: see
    read_checkpoint. CheckpointError if the file is broken or holds other tensors, ConfigError if a key must be given,
    or cannot be.
    """
    checkpoint = read_checkpoint(path, take)
    count = len(checkpoint.tensors)
    is_dinov3 = any(name.endswith(DINOV3_ANCHOR) for name in checkpoint.tensors)
    is_vit = any(name.endswith(HF_ANCHORS) for name in checkpoint.tensors) and not is_dinov3
    tensors, notes = plain_names({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
    refuse_foreign(tensors, str(path))
    model_class = _class_of(tensors)
    notes += _settle_mask_token(tensors, model_class)
    _require_sizes(tensors, str(path))
    open_keys = KEYS if model_class is ViTMAEForPreTraining else _KEYS_OF_ENCODER
    for name in options.keys() - set(open_keys):
        raise ConfigError(f"{name}={options[name]!r}: {path} leaves open no more than {', '.join(open_keys)}")
    told = {**_declared(checkpoint.content), **options}
    if model_class is not ViTForMaskedImageModeling and "pos_embed" in tensors and "rope_theta" not in told:
        _require_no_eva(checkpoint.tensors, str(path))
    if is_dinov3 and "rope_theta" not in told:
        told["rope_theta"] = _THETA
        notes.append(f"rope_theta: the file does not say; {_THETA}, as DINOv3 has it")
    given = {**(defaults or {}), **told}
    likely_size = None if "image_size" in told else given.pop("image_size", None)
    keys = _Keys(tensors, given, str(path), is_vit and "blocks.0.ls1.gamma" not in tensors, likely_size)
    dtype = checkpoint.tensors[next(iter(checkpoint.tensors))].dtype
    config = keys.config(model_class, dtype)
    if config.position_embeddings == "sincos":  # recomputed, no parameters
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _widths(config)}
    else:
        tensors = fold_positions(tensors, config, str(path))
    model = build(model_class, config, tensors, str(path))
    processor = _processor(config, checkpoint.content, path)
    return Opened("checkpoint", model, processor, count, [*checkpoint.notes, *notes, *keys.notes])


def _class_of(tensors: Mapping[str, Tensor]) -> type[ViTPreTrainedModel]:
    if "decoder_embed.weight" in tensors:
        return ViTMAEForPreTraining
    if "decoder.0.weight" in tensors:
        return ViTForMaskedImageModeling
    if "head.weight" in tensors or "fc_norm.weight" in tensors:
        return ViTForImageClassification
    return ViTModel


def _require_no_eva(tensors: Iterable[str], where: str) -> None:
    """timm's Eva has biases of query and value alone, and is rotary (EVA-02) or not (EVA): its tensors do not tell."""
    if any(name.endswith(".attn.q_bias") for name in tensors):
        raise ConfigError(
            f"rope_theta: {where} is of timm's Eva, and does not say whether its positions are rotary, as EVA-02's; "
            "name timm's folder with its config.json, or, for one that is not rotary, give rope_theta=null to "
            "from_pretrained, or to `vitscale convert`, whose folder opens everywhere"
        )


def _settle_mask_token(tensors: dict[str, Tensor], model_class: type[ViTPreTrainedModel]) -> Iterable[str]:
    """An encoder's own mask token by our name if the model has one, else left out. MAE's is the decoder's."""
    if model_class is ViTMAEForPreTraining:
        return
    token = tensors.pop("mask_token", None)
    if token is not None and model_class is ViTForMaskedImageModeling:
        tensors[_MASK_TOKEN] = token.reshape(1, 1, -1)
    elif token is not None:
        yield "not used, of its pretraining: mask_token"


def _require_sizes(tensors: Mapping[str, Tensor], where: str) -> None:
    needed = [TIMM_ANCHOR, "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    if "decoder_embed.weight" in tensors:
        needed += ["pos_embed", "decoder_pos_embed", "decoder_blocks.0.mlp.fc1.weight"]
    require(needed, tensors, where)


def _declared(content: Mapping[Any, Any]) -> dict[str, Any]:
    """What a file says of KEYS: by our own note, or by the arguments of the run that wrote it."""
    arguments, written = content.get("args"), content.get(WRITTEN)
    of_pixels = getattr(arguments, "norm_pix_loss", None) if isinstance(arguments, argparse.Namespace) else None
    declared: dict[str, Any] = {"norm_pix_loss": of_pixels} if isinstance(of_pixels, bool) else {}
    if isinstance(written, dict):
        declared |= {name: written[name] for name in (*KEYS, "mask_ratio", "id2label") if name in written}
    return declared


@dataclass
class _Keys:
    """The config of tensors by timm's names: what they tell, what was given, what published ones have (then a note)."""

    tensors: dict[str, Tensor]
    given: Mapping[str, Any]
    where: str
    is_vit: bool  # of transformers, whose eps is its own
    likely_size: Any = None  # image_size of the model that it is for: of this one too where the positions agree
    notes: list[str] = field(default_factory=list)

    def config(self, model_class: type[ViTPreTrainedModel], dtype: torch.dtype) -> ViTConfig:
        theta, head_width = self._rotary()
        keys = sizes(self.tensors)
        width, patch = keys["hidden_size"], pair(keys["patch_size"])
        patches = self._patches(keys)
        known = _HEADS if theta is None else _HEADS_OF_ROTARY
        heads = {**known, **({width: width // head_width} if head_width else {})}
        keys |= {
            "num_attention_heads": self._heads("num_attention_heads", width, heads),
            "layer_norm_eps": self._eps(theta),
            "image_size": self._image_size(patches, patch),
            "rope_theta": theta,
        }
        if keys["fc_norm"] or not keys["use_cls_token"]:
            keys["pooling"] = "mean"
        if model_class is ViTMAEForPreTraining:
            keys |= self._decoder()
        elif model_class is ViTForImageClassification:
            keys["id2label"] = self._names(keys["num_labels"])
        keys["position_embeddings"] = "none" if patches is None else "learned"
        try:
            config = model_class.config_class(**keys)
        except ConfigError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        if patches is None:
            return config
        if config.num_patches != patches:
            raise ConfigError(
                f"image_size={config.image_size}: {self.where} has positions for {patches} patches of "
                f"{config.patch_size}; give image_size=H,W that make as many"
            )
        if not _is_fixed(self.tensors, config):
            return config
        if dtype != torch.float32:
            self.notes.append(f"pos_embed: MAE's table, of {dtype} in the file, is computed anew")
        return replace(config, position_embeddings="sincos")

    def _rotary(self) -> tuple[float | None, int | None]:
        """Base of rotary positions and width of a head, as far as the file tells; else what was given."""
        theta, head_width = rope_theta(self.tensors)
        if theta is not None or "rope_theta" in self.given:
            return theta or self.given["rope_theta"], head_width
        if "pos_embed" not in self.tensors and not any("rope" in name for name in self.tensors):
            raise ConfigError(
                f"rope_theta: {self.where} has no positions and does not say whether they are rotary; give "
                "rope_theta=100 for DINOv3's, rope_theta=null for none, or name a folder with its config.json"
            )
        return None, None

    def _patches(self, keys: Mapping[str, Any]) -> int | None:
        """How many patches have positions; None if none has."""
        positions = self.tensors.get("pos_embed")
        if positions is None:
            return None
        cls, registers = int(keys["use_cls_token"]), keys["num_register_tokens"]
        counts = [positions.shape[1] - front for front in dict.fromkeys((cls, 0, cls + registers))]
        return next((count for count in counts if math.isqrt(count) ** 2 == count), counts[0])

    def _heads(self, key: str, width: int, heads: Mapping[int, int]) -> int:
        if key in self.given:
            return self.given[key]
        if width not in heads:
            widths = listed(sorted(heads))
            raise ConfigError(
                f"{key}: {self.where} does not say, and its width {width} is none of the published models' ({widths}); "
                f"give {key}=N to from_pretrained or `vitscale convert`, or model.{key}=N to a run"
            )
        return heads[width]

    def _eps(self, theta: float | None) -> float:
        if "layer_norm_eps" in self.given:
            return self.given["layer_norm_eps"]
        if not self.is_vit:
            return EPS if theta is None else _EPS_OF_ROTARY
        self.notes.append(f"layer_norm_eps: the file does not say; {_EPS_OF_TRANSFORMERS}, as transformers has it")
        return _EPS_OF_TRANSFORMERS

    def _image_size(self, patches: int | None, patch: tuple[int, int]) -> Any:
        """What was given, else that of as many patches along both sides."""
        if "image_size" in self.given:
            return self.given["image_size"]
        if patches is None and self.likely_size is not None:
            return self.likely_size
        if patches is None:
            size = tuple(_DEFAULT_SIZE // side * side for side in patch)
            self.notes.append(f"image_size: no positions tell it; {size[0]}x{size[1]}, give image_size=H,W for another")
            return size
        if self.likely_size is not None and patches == math.prod(
            whole // part for whole, part in zip(pair(self.likely_size), patch, strict=True)
        ):
            return self.likely_size
        side = math.isqrt(patches)
        if side * side != patches:
            raise ConfigError(
                f"image_size: {self.where} has positions for {patches} patches, no square; give image_size=H,W"
            )
        return side * patch[0], side * patch[1]

    def _decoder(self) -> dict[str, Any]:
        if "norm_pix_loss" not in self.given:
            self.notes.append(
                "norm_pix_loss: the file does not say; false, as models_mae.py has it, changes the loss alone"
            )
        width = self.tensors["decoder_pos_embed"].shape[-1]
        return {
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": depth(self.tensors, "decoder_blocks"),
            "decoder_num_attention_heads": self._heads("decoder_num_attention_heads", width, _DECODER_HEADS),
            "decoder_intermediate_size": len(self.tensors["decoder_blocks.0.mlp.fc1.weight"]),
            "norm_pix_loss": self.given.get("norm_pix_loss", False),
            "mask_ratio": self.given.get("mask_ratio", 0.75),
        }

    def _names(self, classes: int) -> Any:
        names = self.given.get("id2label")
        if isinstance(names, dict) and len(names) != classes:
            raise CheckpointError(
                f"{self.where}: its note has id2label of {len(names)} names, and its head {classes} rows"
            )
        return names


def _widths(config: ViTConfig) -> dict[str, int]:
    """The position tables of a model, and their widths."""
    decoder = {"decoder_pos_embed": config.decoder_hidden_size} if isinstance(config, ViTMAEConfig) else {}
    return {"pos_embed": config.hidden_size, **decoder}


def _is_fixed(tensors: dict[str, Tensor], config: ViTConfig) -> bool:
    """Whether all positions are the tables that MAE starts from (and keeps, in pretraining)."""
    widths = _widths(config).items()
    return all(width % 4 == 0 and is_table(tensors[name], sincos_table(width, config.grid)) for name, width in widths)


def _processor(config: ViTConfig, content: Mapping[Any, Any], path: Path) -> ViTImageProcessor:
    """Our own note, else main_finetune.py's evaluation: bicubic to 256 for 224, the middle, ImageNet's numbers."""
    written = content.get(WRITTEN)
    if isinstance(written, dict) and isinstance(written.get("processor"), dict):
        note = {str(key): value for key, value in written["processor"].items()}
        return ViTImageProcessor.from_dict(note, f"{path}: its note on images")
    height, width = pair(config.image_size)
    same = config.num_channels == len(IMAGENET_MEAN)
    square = height == width <= 224  # larger ones are resized as they are
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if same else (0.5, 0.5)
    return processor_for(config, mean, std, {"shortest_edge": int(height / (224 / 256))} if square else None)
