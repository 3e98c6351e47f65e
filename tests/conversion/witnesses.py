"""Models opened by code that is not ours: transformers, timm, and timm's blocks put together as the MAE code does.

They tell whether what was read or written means to others what it means here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from vitscale.bench.peers import TimmMAE
from vitscale.config.model_rules import pair
from vitscale.files.model_folder import CONFIG, read_json
from vitscale.interop.pretrained import prefix_of
from vitscale.interop.timm_names import timm_name
from vitscale.interop.vision_transformer import mlp_ratio
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.positions import fixed_positions, is_table
from vitscale.models.simmim import MaskedImageModel, ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]  # last_hidden_state, pooler_output, logits, reconstruction, patches (MAE's logits)


@dataclass(frozen=True)
class Witness:
    """A model opened by other code."""

    name: str
    run: Callable[[Inputs], Outputs]


def inputs_for(model: ViTPreTrainedModel, n: int = 2, seed: int = 0) -> Inputs:
    """Random images of the model's size, and what is hidden of them, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    given = {"pixel_values": torch.randn(n, config.num_channels, *pair(config.image_size), generator=generator)}
    noise = torch.rand(n, config.num_patches, generator=generator)
    if isinstance(model, ViTMAEForPreTraining):
        given["noise"] = noise
    elif isinstance(model, ViTForMaskedImageModeling):
        given["bool_masked_pos"] = noise < 0.5
    return given


@torch.no_grad()
def ours(model: ViTPreTrainedModel, inputs: Inputs) -> Outputs:
    """What our model makes of them; the encoder alone always sees whole images."""
    if isinstance(model, ViTModel):
        return _without_none(model(**inputs), "last_hidden_state", "pooler_output")
    outputs = {"last_hidden_state": model.base_model(inputs["pixel_values"]).last_hidden_state}
    if isinstance(model, ViTForMultitaskPreTraining):
        return outputs | _without_none(model(**inputs), "logits")
    if isinstance(model, ViTMAEForPreTraining):
        return outputs | {"patches": model(**inputs).logits}
    name = "reconstruction" if isinstance(model, MaskedImageModel) else "logits"
    return outputs | _without_none(model(**inputs), name)


def _without_none(output: Any, *names: str) -> Outputs:
    return {name: output[name] for name in names if output.get(name) is not None}


def by_transformers(folder: Path, model: ViTPreTrainedModel) -> Witness:
    """A folder as transformers opens it: strictly, but for the decoder of a class that it does not have.

    A number in config.json that is whole where transformers insists on a point is given to it with one.
    """
    multitask = isinstance(model, ViTForMultitaskPreTraining)
    name = ViTForImageClassification.__name__ if multitask else type(model).__name__
    their_class = getattr(transformers, name)
    more: dict[str, Any] = {}
    if isinstance(model, ViTModel):
        has_mask_token = model.embeddings.mask_token is not None
        more = {"add_pooling_layer": model.pooler is not None, "use_mask_token": has_mask_token}
    said, typed = read_json(folder / CONFIG), model.config.to_dict()
    said |= {key: typed[key] for key, value in said.items() if key in typed and typed[key] == value}
    more |= {"config": their_class.config_class.from_dict(said), "dtype": torch.float32}
    opened, report = their_class.from_pretrained(folder, output_loading_info=True, **more)
    wrong = {kind: keys for kind, keys in report.items() if keys and not (multitask and kind == "unexpected_keys")}
    assert not wrong
    state = opened.state_dict()
    for name, table in _whole(state, fixed_positions(model)).items():
        state[name].copy_(table)
    opened.eval()

    @torch.no_grad()
    def run(inputs: Inputs) -> Outputs:
        output = opened(**inputs)
        if isinstance(model, ViTMAEForPreTraining):  # whose encoder always hides patches
            return {"patches": output.logits}
        outputs = _without_none(output, "last_hidden_state", "pooler_output", "logits", "reconstruction")
        if hasattr(opened, "vit"):
            outputs["last_hidden_state"] = opened.vit(inputs["pixel_values"]).last_hidden_state
        return outputs

    return Witness("transformers", run)


def by_timm(folder: Path) -> Witness:
    """A folder as timm.create_model opens it, strictly."""
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    @torch.no_grad()
    def run(inputs: Inputs) -> Outputs:
        features = opened.forward_features(inputs["pixel_values"].float())
        return {"last_hidden_state": features, "logits": opened.forward_head(features)}

    return Witness("timm", run)


def by_mae(path: Path, model: ViTPreTrainedModel) -> Witness:
    """A .pth in what the MAE code makes of timm's parts: models_vit.py's model, or models_mae.py's."""
    timm_vit = timm.models.vision_transformer
    content = torch.load(path, weights_only=True)
    tensors, config = content.get("model", content), model.config
    opened: Any
    if isinstance(config, ViTMAEConfig):
        opened = TimmMAE(config)
    else:
        opened = timm_vit.VisionTransformer(
            img_size=pair(config.image_size),
            patch_size=pair(config.patch_size),
            in_chans=config.num_channels,
            num_classes=len(tensors.get("head.weight", ())),
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=mlp_ratio(config.intermediate_size, config.hidden_size),
            global_pool="avg" if config.fc_norm else "token",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    prefix = prefix_of(model)
    tables = {str(timm_name(prefix + name)): table for name, table in fixed_positions(model).items()}
    opened.load_state_dict(tensors | _whole(tensors, tables))
    opened.eval()

    @torch.no_grad()
    def run(inputs: Inputs) -> Outputs:
        if isinstance(opened, TimmMAE):
            _, patches = opened(inputs["pixel_values"], inputs["noise"])
            return {"last_hidden_state": opened.encode(inputs["pixel_values"]), "patches": patches}
        features = opened.forward_features(inputs["pixel_values"])
        return {"last_hidden_state": features, "logits": opened.forward_head(features)}

    return Witness("the MAE code on timm", run)


def _whole(tensors: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fixed positions, where a file has them too: those in half precision are computed anew by our model."""
    return {name: table for name, table in fixed.items() if is_table(tensors[name], table)}
