"""A run's config becomes a model; its parameters start from what (seed, name) say."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.shapes import TRAINABLE, inputs, tiny, tiny_keys
from vitscale.config.presets import preset
from vitscale.config.schema import MAE, Model, Multitask, Objective, RunConfig, SimMIM
from vitscale.errors import ConfigError
from vitscale.models.auto import OBJECTIVES, build_model, initialize, vit_config
from vitscale.models.configuration import ViTConfig
from vitscale.models.mae import ViTMAEConfig, ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

every_trainable = pytest.mark.parametrize("model_class", TRAINABLE, ids=lambda c: c.__name__)


def run_config(objective: str, **model: object) -> RunConfig:
    return RunConfig(model=Model(**model), objective=Objective(name=objective))


@every_trainable
def test_no_parameter_is_forgotten(model_class: type[ViTPreTrainedModel]) -> None:
    model = tiny(model_class, position_embeddings="learned")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, 0)
    assert [name for name, p in model.named_parameters() if not torch.isfinite(p).all()] == []


@every_trainable
def test_start_is_a_function_of_seed_and_name(model_class: type[ViTPreTrainedModel]) -> None:
    first = tiny(model_class)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**tiny_keys(model_class)))
    torch.manual_seed(123)
    initialize(model, 0)  # makes the memory of a model on the meta device
    for (name, a), b in zip(first.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(first.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b), name
    initialize(model, 1)
    drawn = {name for name, p in model.named_parameters() if p.ndim > 1}
    same = {name for name, p in first.named_parameters() if torch.equal(p, model.get_parameter(name))}
    assert not same & drawn
    # More blocks leave the first ones as they are.
    deeper = tiny(model_class, num_hidden_layers=5)
    for name, value in first.vit.state_dict().items():
        assert torch.equal(value, deeper.vit.state_dict()[name])


def test_mae_starts_as_mae() -> None:
    model = tiny(ViTMAEForPreTraining, hidden_size=64, intermediate_size=128)
    qkv = model.vit.encoder.layers[0].attention.attention.qkv.weight
    bound = math.sqrt(6 / (64 + 3 * 64))  # xavier_uniform of the fused matrix
    assert 0.98 * bound < qkv.abs().max() <= bound
    patch = model.vit.embeddings.patch_embeddings.projection.weight
    bound = math.sqrt(6 / (64 + 48))
    assert 0.98 * bound < patch.abs().max() <= bound
    assert 0.01 < model.vit.embeddings.cls_token.std() < 0.03
    assert 0.005 < model.decoder.mask_token.std() < 0.04


def test_the_others_start_as_timm() -> None:
    model = tiny(ViTForMultitaskPreTraining, hidden_size=64, initializer_range=0.05)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    for name, weight in weights.items():
        assert 0.03 < weight.std() < 0.07, name
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    norms = [p for name, p in model.named_parameters() if "layernorm" in name and name.endswith("weight")]
    assert len(norms) == 7
    assert all((p == 1).all() for p in norms)


def test_config_keys_reach_the_model() -> None:
    config = vit_config(
        run_config("mae", hidden_size=96, num_attention_heads=4, intermediate_size=384, drop_path_rate=0.1)
    )
    assert isinstance(config, ViTMAEConfig)
    assert (config.hidden_size, config.drop_path_rate, config.position_embeddings) == (96, 0.1, "sincos")
    assert (config.norm_pix_loss, config.mask_ratio, config.layer_norm_eps) == (True, 0.75, 1e-6)
    config = vit_config(RunConfig(
        objective=Objective(name="mae", mae=MAE(mask_ratio=0.6, norm_pix_loss=False, decoder_hidden_size=64)),
        model=Model(position_embeddings="learned"),
    ))  # fmt: skip
    assert (config.mask_ratio, config.norm_pix_loss, config.decoder_hidden_size) == (0.6, False, 64)
    assert config.position_embeddings == "learned"
    config = vit_config(RunConfig(
        objective=Objective(name="multitask", simmim=SimMIM(0.5, 4), multitask=Multitask(0.3, 0.7)),
        model=Model(num_labels=37, patch_size=8),
    ))  # fmt: skip
    assert type(config) is ViTConfig
    assert (config.mask_ratio, config.mask_patch, config.mim_weight, config.classification_weight) == (0.5, 4, 0.3, 0.7)
    assert (config.num_labels, config.encoder_stride, config.position_embeddings) == (37, 8, "learned")
    with pytest.raises(ConfigError, match=r"model\.patch_size"):
        vit_config(run_config("simmim", patch_size=(16, 8)))


@pytest.mark.parametrize(("size", "millions"), [("Ti", 5.5), ("S", 21.7), ("B", 85.8), ("L", 303.3), ("H", 630.8)])
def test_parameter_counts(size: str, millions: float) -> None:
    """Of the encoder at 224 pixels without a head; timm's vit_*_patch*_224 with num_classes=0."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig(**preset(size)), add_pooling_layer=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("size", "millions"), [("B", 111.91), ("L", 329.54), ("H", 657.07)])
def test_parameter_counts_of_mae(size: str, millions: float) -> None:
    """mmpretrain's table (configs/mae), which counts the fixed positions in."""
    with torch.device("meta"):
        model = build_model(run_config("mae", **preset(size)))
    values = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    assert values / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_flops_are_what_torch_counts(objective: str) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    with torch.device("meta"):
        model = build_model(run_config(objective, **sizes, image_size=(32, 64), patch_size=8, num_labels=7))
    initialize(model, 0)
    batch = inputs(model, n=2)
    with FlopCounterMode(display=False) as counter:
        # The fused attention of a CPU is not counted by torch; the eager one is.
        model.eval()(**batch, output_attentions=True)
    counted = counter.get_total_flops()
    if objective == "mae":  # whose decoder has no eager path
        tokens, width, layers = 33, 512, 8
        counted += 2 * layers * 2 * 2 * tokens * tokens * width
    assert counted == 2 * model.forward_flops()
    assert model.flops_per_image() == 3 * model.forward_flops()


def test_published_flops() -> None:
    """mmpretrain's encoder: 17.58 G multiply-adds for ViT-B/16 at 224 pixels, ours without the softmax."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig(**preset("B")))
    assert model.forward_flops() / 2e9 == pytest.approx(17.58, rel=0.01)


def test_blocks_are_all_of_them() -> None:
    assert len(tiny(ViTMAEForPreTraining).blocks()) == 3 + 2
    assert len(tiny(ViTForMultitaskPreTraining).blocks()) == 3
