"""A run's config becomes a model; its parameters start from what (seed, name) say."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.shapes import EVERY_OPTION, OPTION_SETS, TRAINABLE, inputs, tiny, tiny_keys
from vitscale.config import model_rules, schema
from vitscale.config.augmentation import Augmentation
from vitscale.config.check import check_config, problem_type
from vitscale.config.presets import preset
from vitscale.config.schema import MAE, Model, Multitask, Objective, RunConfig, SimMIM, Train
from vitscale.errors import ConfigError
from vitscale.models import auto
from vitscale.models.activations import ACTIVATIONS
from vitscale.models.auto import FREE_KEYS, OBJECTIVES, build_model, initialize, model_keys, new_model, vit_config
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import OPTIONS, ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.world import World

every_trainable = pytest.mark.parametrize("model_class", TRAINABLE, ids=lambda c: c.__name__)


# Keys of ViTConfig that are an objective's own and are written there.
ELSEWHERE = {
    "mask_ratio": [schema.MAE, schema.SimMIM],
    "mask_patch": [schema.SimMIM],
    "label_smoothing": [schema.Classification],
    "mim_weight": [schema.Multitask],
    "classification_weight": [schema.Multitask],
}
NARROW = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def run_config(objective: str, **model: Any) -> RunConfig:
    return RunConfig(model=Model(**model), objective=Objective(name=objective), train=Train(steps=1))


def names(section: type) -> set[str]:
    return {item.name for item in fields(section)}


@pytest.mark.parametrize("options", [*OPTION_SETS.values(), {"fc_norm": True}], ids=[*OPTION_SETS, "fc_norm"])
@every_trainable
def test_no_parameter_is_forgotten(model_class: type[ViTPreTrainedModel], options: dict[str, Any]) -> None:
    if "fc_norm" in options and model_class is not ViTForImageClassification:
        return
    model = tiny(model_class, **{"position_embeddings": "learned"} | options)
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_to_be_loaded_is_not_drawn(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed tables are there all the same."""
    config = run_config(objective, **NARROW, image_size=32)
    drawn = new_model(config, 0)
    monkeypatch.setattr(auto, "_generator", lambda seed, name: pytest.fail(f"{name} is drawn"))
    model = new_model(config, 0, drawn=False)
    assert model.state_dict().keys() == drawn.state_dict().keys()
    tables = dict(model.named_buffers())
    assert all(torch.equal(tables[name], table) for name, table in drawn.named_buffers())


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


def test_every_key_of_vit_config_can_be_written() -> None:
    for name, sections in ELSEWHERE.items():
        assert all(name in names(section) for section in sections)
    assert names(ViTMAEConfig) - names(ViTConfig) <= names(MAE)


WRITTEN: dict[str, Any] = {
    "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20, "hidden_act": "relu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3, "initializer_range": 0.01,
    "layer_norm_eps": 1e-3, "image_size": 64, "patch_size": 8, "num_channels": 5, "qkv_bias": False,
    "encoder_stride": 8, "pooler_output_size": 7, "pooler_act": "relu", "position_embeddings": "sincos",
    "num_labels": 2, "id2label": ("cat", "dog"), "problem_type": "single_label_classification",
    "use_cls_token": False, "num_register_tokens": 2, "rope_theta": 50.0, "layer_scale_init_value": 0.1,
    "qk_norm": True, "swiglu": True, "pooling": "mean", "fc_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("objective", ["classification", "multitask"])
def test_every_key_of_the_model_section_arrives(objective: str) -> None:
    assert set(WRITTEN) == names(Model) - {"preset", "init_from", "init_take"}
    config = vit_config(run_config(objective, **WRITTEN))
    expected = WRITTEN | {"id2label": {0: "cat", 1: "dog"}, "fc_norm": objective == "classification"}
    assert {name: getattr(config, name) for name in WRITTEN} == expected
    assert config.to_dict()["label2id"] == {"cat": 0, "dog": 1}


def test_a_run_says_that_its_labels_are_classes() -> None:
    """Else soft labels in floating point would be told to be of many classes each."""
    for said in (None, "single_label_classification"):
        config = vit_config(run_config("classification", num_labels=3, problem_type=said))
        assert config.problem_type == "single_label_classification"
    for said in (None, "regression"):
        assert vit_config(run_config("classification", num_labels=1, problem_type=said)).problem_type == said


def test_activations_are_those_of_the_schema() -> None:
    assert tuple(ACTIVATIONS) == model_rules.ACTIVATIONS


@pytest.mark.parametrize("objective", schema.OBJECTIVES)
@pytest.mark.parametrize(
    ("size", "patch"),
    [(224, 16), (224, 32), (14, 2), (96, 8), (16, 4), (28, 14), (48, 16), ((32, 64), 16), (64, (8, 8))],
)
def test_the_objectives_name_alone_can_change(objective: str, size: Any, patch: Any) -> None:
    config = run_config(objective, **NARROW, image_size=size, patch_size=patch)
    check_config(config, World())
    with torch.device("meta"):
        model = build_model(config)
    if model.config.num_patches <= 64:  # and it runs: the mask fits the grid
        initialize(model, 0)
        assert torch.isfinite(model(**inputs(model, n=2)).loss)


@settings(max_examples=100)
@given(
    objective=st.sampled_from(schema.OBJECTIVES),
    model=st.fixed_dictionaries({
        "image_size": st.sampled_from([4, 8, 12, (8, 16)]),
        "patch_size": st.sampled_from([1, 2, 4, (4, 4), (2, 4)]),
        "hidden_size": st.sampled_from([8, 12, 6]),
        "num_attention_heads": st.sampled_from([1, 2, 4]),
        "num_channels": st.sampled_from([1, 3]),
        "encoder_stride": st.sampled_from([None, None, None, 2, (2, 4)]),
        "position_embeddings": st.sampled_from(["auto", "learned", "sincos", "none"]),
        "num_labels": st.sampled_from([3, 1, 0]),
        "problem_type": st.sampled_from([None, None, *model_rules.PROBLEM_TYPES]),
        "use_cls_token": st.booleans(),
        "pooling": st.sampled_from(["cls", "mean", "mean"]),
        "num_register_tokens": st.sampled_from([0, 2]),
        "rope_theta": st.sampled_from([None, 100.0]),
        "layer_scale_init_value": st.sampled_from([None, 0.1]),
        "qk_norm": st.booleans(),
        "swiglu": st.booleans(),
        "fc_norm": st.booleans(),
        "pooler_act": st.sampled_from(model_rules.ACTIVATIONS),
    }),
    simmim=st.builds(SimMIM, st.sampled_from([0.6, 0.1, 0.9]), st.sampled_from([None, 1, 2, 3])),
    mae=st.builds(
        MAE, st.sampled_from([0.75, 0.1, 0.99]), st.booleans(), st.sampled_from([8, 6]), st.just(1),
        st.sampled_from([1, 2, 4]), st.just(8),
    ),
)  # fmt: skip
def test_what_is_checked_can_be_built(objective: str, model: dict[str, Any], simmim: SimMIM, mae: MAE) -> None:
    """A config that check_config lets through never fails later, where the model is built and runs."""
    config = RunConfig(
        model=Model(**model, num_hidden_layers=1, intermediate_size=8),
        objective=Objective(objective, mae=mae, simmim=simmim),
        augment=Augmentation(mean=(0.5,), std=(0.5,)),
        train=Train(steps=1),
    )
    try:
        check_config(config, World())
    except ConfigError:
        return
    with torch.device("meta"):
        built = build_model(config)
    initialize(built, 0)
    given = inputs(built, n=2)
    if problem_type(config) in ("multi_label_classification", "regression"):
        given["labels"] = torch.rand(2, config.model.num_labels)
    assert torch.isfinite(built(**given).loss)


def test_model_keys_are_what_the_weights_depend_on() -> None:
    of_all = {f"model.{name}" for name in names(ViTConfig) - FREE_KEYS - {"num_labels"} - OPTIONS.keys()}
    of_all |= {"objective.name"}
    of_mae = {f"objective.mae.{name}" for name in names(MAE) - FREE_KEYS}
    config = run_config("mae", **WRITTEN)
    of_options = {f"model.{name}" for name in OPTIONS.keys() - {"fc_norm"}}  # which is of classification
    assert model_keys(config).keys() == of_all | of_mae | of_options
    assert model_keys(run_config("mae")).keys() == of_all | of_mae  # as a checkpoint from before the options has it
    for objective in ("classification", "multitask"):
        assert model_keys(run_config(objective)).keys() == of_all | {"model.num_labels"}
    assert model_keys(run_config("simmim")).keys() == of_all
    assert json.loads(json.dumps(model_keys(config))) == model_keys(config)
    assert model_keys(run_config("mae"))["model.position_embeddings"] == "sincos"
    assert model_keys(run_config("simmim"))["model.position_embeddings"] == "learned"


@pytest.mark.parametrize(
    ("free", "change"),
    [
        (True, {"drop_path_rate": 0.5}), (True, {"initializer_range": 0.5}), (True, {"pooler_act": "relu"}),
        (True, {"id2label": ("tabby", "dog")}), (True, {"init_from": "folder"}), (True, {"patch_size": (8, 8)}),
        (False, {"hidden_act": "gelu"}), (False, {"layer_norm_eps": 1e-6}), (False, {"num_attention_heads": 8}),
        (False, {"position_embeddings": "learned"}), (False, {"image_size": (64, 32)}),
        (False, {"num_labels": 3, "id2label": None}), (False, {"rope_theta": None}), (False, {"qk_norm": False}),
        (False, {"num_register_tokens": 0}), (False, {"swiglu": False}), (False, {"use_cls_token": True}),
        (True, {"fc_norm": False}), (True, {"problem_type": None}),
    ],
)  # fmt: skip
def test_model_keys_differ_where_the_weights_would(free: bool, change: dict[str, Any]) -> None:
    config = run_config("multitask", **WRITTEN)
    changed = replace(config, model=replace(config.model, **change))
    assert (model_keys(changed) == model_keys(config)) == free
    objective = replace(config.objective, simmim=SimMIM(0.3, 1), multitask=Multitask(0.1, 0.2))
    assert model_keys(replace(config, objective=objective)) == model_keys(config)


@pytest.mark.parametrize(("size", "millions"), [("Ti", 5.5), ("S", 21.7), ("B", 85.8), ("L", 303.3), ("H", 630.8)])
def test_parameter_counts(size: str, millions: float) -> None:
    """Of the encoder at 224 pixels without a head; timm's vit_*_patch*_224 with num_classes=0."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig(**preset(size)), add_pooling_layer=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("size", "millions"), [("B", 86), ("L", 307), ("H", 632)])
def test_published_parameter_counts(size: str, millions: float) -> None:
    """Dosovitskiy et al. 2021, table 1, with a head of ImageNet's 1,000 classes; and transformers', to the last one."""
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**preset(size), num_labels=1000))
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**preset(size), num_labels=1000))
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("size", "shape", "millions"), [
    ("low", (256, 6, 8, 224), 5.0), ("medium", (768, 12, 12, 224), 85.8), ("high", (1024, 24, 16, 384), 303.7),
])  # fmt: skip
def test_tiers_of_resources(size: str, shape: tuple[int, ...], millions: float) -> None:
    config = ViTConfig(**preset(size))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.image_size) == shape
    with torch.device("meta"):
        model = ViTModel(config, add_pooling_layer=False)
    width, layers, _, side = shape
    patch, block = 3 * 256 * width + width, 12 * width**2 + 13 * width
    by_hand = patch + (2 + (side // 16) ** 2) * width + layers * block + 2 * width
    assert sum(p.numel() for p in model.parameters()) == by_hand
    assert by_hand / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("size", "millions"), [("B", 111.91), ("L", 329.54), ("H", 657.07)])
def test_parameter_counts_of_mae(size: str, millions: float) -> None:
    """mmpretrain's table (configs/mae), which counts the fixed positions in."""
    with torch.device("meta"):
        model = build_model(run_config("mae", **preset(size)))
    values = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    assert values / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("options", "tokens"), [
    ({}, 33), ({**EVERY_OPTION, "position_embeddings": "learned"}, 32), ({"num_register_tokens": 2}, 33),
])  # fmt: skip
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_flops_are_what_torch_counts(objective: str, options: dict[str, Any], tokens: int) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40}
    with torch.device("meta"):
        model = build_model(run_config(objective, **sizes, image_size=(32, 64), patch_size=8, num_labels=7, **options))
    initialize(model, 0)
    batch = inputs(model, n=2)
    with FlopCounterMode(display=False) as counter:
        # The fused attention of a CPU is not counted by torch; the eager one is.
        model.eval()(**batch, output_attentions=True)
    counted = counter.get_total_flops()
    if objective == "mae":  # whose decoder has no eager path
        width, layers = 512, 8
        counted += 2 * layers * 2 * 2 * tokens * tokens * width
    assert counted == 2 * model.forward_flops()
    assert model.flops_per_image() == 3 * model.forward_flops()


@pytest.mark.parametrize("objective", ["mae", "classification"])
def test_flops_of_a_step_are_what_torch_counts_of_forward_and_backward(objective: str) -> None:
    """But for a gradient of the images, which nobody takes: less than 1%."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # whose products torch counts on any device
        model = build_model(run_config(objective, **preset("B"), num_labels=1000)).train()
        given = {"sample_key": torch.arange(2)} if objective == "mae" else {"labels": torch.zeros(2, dtype=torch.long)}
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(2, 3, 224, 224), **given).loss.backward()
    assert counter.get_total_flops() == pytest.approx(2 * model.flops_per_image(), rel=0.01)


def test_published_flops() -> None:
    """mmpretrain's encoder: 17.58 G multiply-adds for ViT-B/16 at 224 pixels, ours without the softmax."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig(**preset("B")))
    assert model.forward_flops() / 2e9 == pytest.approx(17.58, rel=0.01)


def test_blocks_are_all_of_them() -> None:
    assert len(tiny(ViTMAEForPreTraining).blocks()) == 3 + 2
    assert len(tiny(ViTForMultitaskPreTraining).blocks()) == 3
