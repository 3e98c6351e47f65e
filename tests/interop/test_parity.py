"""Our models and transformers' own classes: the same numbers, by folders written from either side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vitscale
from tests.models.shapes import DECODER, TINY, TRAINABLE, tiny_keys
from vitscale.config.model_rules import pair
from vitscale.errors import ConfigError
from vitscale.interop.loading import LoadReport
from vitscale.interop.pretrained import load_model, save_model
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

transformers = pytest.importorskip("transformers")

CLASSES = [ViTModel, *(c for c in TRAINABLE if c is not ViTForMultitaskPreTraining)]
AUTO = {
    ViTModel: "AutoModel",
    ViTForImageClassification: "AutoModelForImageClassification",
    ViTForMaskedImageModeling: "AutoModelForMaskedImageModeling",
    ViTMAEForPreTraining: "AutoModelForPreTraining",
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "patch14": {"image_size": 28, "patch_size": 14, "encoder_stride": 14, "layer_norm_eps": 1e-6},
    "no_qkv_bias": {"qkv_bias": False, "layer_norm_eps": 1e-2},
    "one_channel": {"num_channels": 1, "hidden_act": "gelu_new"},
    "four_channels": {"num_channels": 4, "intermediate_size": 40, "num_attention_heads": 4},
    "thirteen_channels": {"num_channels": 13, "hidden_act": "relu", "num_hidden_layers": 1},
}
OBLONG: dict[str, Any] = {"image_size": (8, 24), "patch_size": (4, 6)}  # transformers' decoders take squares only
NORM = {"norm_pix_loss": True, "mask_ratio": 0.5}

every_class = pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def keys_of(model_class: type[ViTPreTrainedModel], shape: str) -> dict[str, Any]:
    keys = tiny_keys(model_class) | SHAPES[shape]
    if model_class is ViTMAEForPreTraining:
        keys.pop("encoder_stride", None)
        keys |= NORM if shape in ("patch14", "four_channels") else {}
    return keys


def shaken(model: nn.Module) -> nn.Module:
    """Random values in every parameter, so that no bias is 0 and no norm 1. Fixed tables stay."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save_ours(model: ViTPreTrainedModel, folder: Path) -> Path:
    channels = model.config.num_channels
    save_model(folder, type(model).__name__, model.config, model.state_dict(), (0.5,) * channels, (0.25,) * channels)
    return folder


def open_theirs(folder: Path, class_name: str) -> nn.Module:
    model, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing left over
    return model.eval()


def inputs(ours: ViTPreTrainedModel, n: int = 3) -> dict[str, Tensor]:
    """Images and what is hidden of them, as both sides take them."""
    generator = torch.Generator().manual_seed(2)
    size, patches = pair(ours.config.image_size), ours.config.num_patches
    given = {"pixel_values": torch.randn(n, ours.config.num_channels, *size, generator=generator)}
    if isinstance(ours, ViTMAEForPreTraining):
        given["noise"] = torch.rand(n, patches, generator=generator)
    if isinstance(ours, ViTForMaskedImageModeling):
        given["bool_masked_pos"] = torch.rand(n, patches, generator=generator) < 0.5
    if isinstance(ours, ViTForImageClassification):
        given["labels"] = torch.arange(n)
    return given


@torch.no_grad()
def assert_equal(ours: ViTPreTrainedModel, theirs: nn.Module, **more: Any) -> None:
    """Every field that transformers gives, we give, and the same."""
    given = inputs(ours) | more
    found, expected = ours(**given), theirs(**given)
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        pairs = zip(value, found[name], strict=True) if isinstance(value, tuple) else [(value, found[name])]
        for theirs_value, ours_value in pairs:
            assert torch.allclose(ours_value, theirs_value, atol=1e-5, rtol=1e-5), name


@every_shape
@every_class
def test_our_folder_opens_in_transformers(tmp_path: Path, model_class: type[ViTPreTrainedModel], shape: str) -> None:
    ours = model_class(model_class.config_class(**keys_of(model_class, shape)))
    initialize(ours, 0)
    shaken(ours)
    theirs = open_theirs(save_ours(ours, tmp_path), model_class.__name__)
    assert_equal(ours, theirs)
    again = load_model(tmp_path)
    assert again.config == ours.config
    assert_equal(again, theirs)


@every_shape
@every_class
def test_their_folder_opens_here(tmp_path: Path, model_class: type[ViTPreTrainedModel], shape: str) -> None:
    config_class = transformers.ViTMAEConfig if model_class is ViTMAEForPreTraining else transformers.ViTConfig
    theirs = shaken(getattr(transformers, model_class.__name__)(config_class(**keys_of(model_class, shape))))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert type(ours) is model_class
    assert_equal(ours, theirs)


@every_class
def test_hidden_states_and_attentions(tmp_path: Path, model_class: type[ViTPreTrainedModel]) -> None:
    ours = model_class(model_class.config_class(**keys_of(model_class, "plain")))
    initialize(ours, 0)
    theirs = open_theirs(save_ours(shaken(ours), tmp_path), model_class.__name__)
    theirs.set_attn_implementation("eager")
    assert_equal(ours, theirs, output_hidden_states=True, output_attentions=True)


@every_class
def test_other_resolutions(tmp_path: Path, model_class: type[ViTPreTrainedModel]) -> None:
    ours = model_class(model_class.config_class(**keys_of(model_class, "plain")))
    initialize(ours, 0)
    theirs = open_theirs(save_ours(shaken(ours), tmp_path), model_class.__name__)
    for height, width in ((24, 24), (8, 8), (16, 16), (20, 28)):
        if model_class is ViTForMaskedImageModeling and height != width:
            continue  # transformers' takes squares only
        more: dict[str, Any] = {"pixel_values": torch.randn(3, 3, height, width), "interpolate_pos_encoding": True}
        patches = height * width // 16
        if model_class is ViTMAEForPreTraining:
            more["noise"] = torch.rand(3, patches)
        if model_class is ViTForMaskedImageModeling:
            if height != 16:  # nor does its loss know another size
                continue
            more["bool_masked_pos"] = torch.rand(3, patches) < 0.5
        assert_equal(ours, theirs, **more)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_of_mae(tmp_path: Path, positions: str) -> None:
    """transformers has both as parameters and its config does not tell which they are: the table does."""
    ours = ViTMAEForPreTraining(ViTMAEForPreTraining.config_class(**TINY, **DECODER, position_embeddings=positions))
    initialize(ours, 0)
    theirs = open_theirs(save_ours(shaken(ours), tmp_path), "ViTMAEForPreTraining")
    assert_equal(ours, theirs)
    del theirs.config.position_embeddings  # a key of ours, which transformers would carry along
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.config.position_embeddings == positions
    assert_equal(again, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_class", [ViTMAEForPreTraining, ViTModel], ids=lambda c: c.__name__)
def test_fixed_positions_in_half_precision(
    tmp_path: Path, model_class: type[ViTPreTrainedModel], dtype: torch.dtype
) -> None:
    """Saved again by transformers, as a folder of ours or, of the MAE, as one that does not say what they are."""
    name, keys = model_class.__name__, tiny_keys(model_class) | {"position_embeddings": "sincos"}
    ours = model_class(model_class.config_class(**keys))
    initialize(ours, 0)
    save_ours(ours, tmp_path)
    theirs = getattr(transformers, name).from_pretrained(tmp_path, dtype=dtype)
    for said in (True, False)[: 1 + (model_class is ViTMAEForPreTraining)]:
        if not said:
            del theirs.config.position_embeddings
        theirs.save_pretrained(tmp_path)
        again = load_model(tmp_path)
        assert again.config.position_embeddings == "sincos"
        assert all(torch.equal(a, b) for a, b in zip(again.buffers(), ours.buffers(), strict=True))


def test_fixed_positions_in_a_plain_vit(tmp_path: Path) -> None:
    keys = tiny_keys(ViTForImageClassification) | {"position_embeddings": "sincos"}
    ours = ViTForImageClassification(ViTForImageClassification.config_class(**keys))
    initialize(ours, 0)
    theirs = open_theirs(save_ours(shaken(ours), tmp_path), "ViTForImageClassification")
    assert_equal(ours, theirs)
    assert load_model(tmp_path).config.position_embeddings == "sincos"


@pytest.mark.parametrize("shape", [{"image_size": (8, 24)}, OBLONG], ids=["image", "patch"])
@pytest.mark.parametrize("model_class", [ViTModel, ViTForImageClassification], ids=lambda c: c.__name__)
def test_what_is_not_square(tmp_path: Path, model_class: type[ViTPreTrainedModel], shape: dict[str, Any]) -> None:
    ours = model_class(ViTConfig(**TINY | shape, num_labels=5))
    initialize(ours, 0)
    theirs = open_theirs(save_ours(shaken(ours), tmp_path / "ours"), model_class.__name__)
    assert_equal(ours, theirs)
    theirs = shaken(getattr(transformers, model_class.__name__)(transformers.ViTConfig(**TINY | shape, num_labels=5)))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal(model_class.from_pretrained(tmp_path / "theirs"), theirs)


@every_class
def test_several_files_by_the_public_calls(tmp_path: Path, model_class: type[ViTPreTrainedModel]) -> None:
    """save_pretrained with max_shard_size, from either side, and the Auto classes of both."""
    ours = model_class(model_class.config_class(**keys_of(model_class, "four_channels")))
    initialize(ours, 0)
    shaken(ours).save_pretrained(tmp_path / "ours", max_shard_size="8KB")
    theirs = open_theirs(tmp_path / "ours", model_class.__name__)
    assert_equal(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    again, report = model_class.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert report == LoadReport()
    assert_equal(again, theirs)
    name = AUTO[model_class]
    assert type(getattr(transformers, name).from_pretrained(tmp_path / "ours")) is type(theirs)
    assert type(getattr(vitscale, name).from_pretrained(tmp_path / "theirs")) is model_class


@every_class
def test_their_newest_names_and_their_pickle(tmp_path: Path, model_class: type[ViTPreTrainedModel]) -> None:
    """`layers.N.attention.q_proj`, which transformers 5 has in memory, and pytorch_model.bin."""
    config_class = transformers.ViTMAEConfig if model_class is ViTMAEForPreTraining else transformers.ViTConfig
    theirs = shaken(getattr(transformers, model_class.__name__)(config_class(**keys_of(model_class, "plain"))))
    theirs.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("layers.0.attention.q_proj.weight") for name in names)
    assert_equal(load_model(tmp_path), theirs)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert_equal(load_model(tmp_path), theirs)


def test_their_encoder_of_an_mae(tmp_path: Path) -> None:
    """ViTMAEModel hides patches; with nothing to hide it is our ViTModel, its order of tokens apart."""
    keys = tiny_keys(ViTMAEForPreTraining) | {"mask_ratio": 0.0}
    theirs = shaken(transformers.ViTMAEModel(transformers.ViTMAEConfig(**keys)))
    theirs.save_pretrained(tmp_path)
    ours = vitscale.AutoModel.from_pretrained(tmp_path)
    assert type(ours) is ViTModel
    pixel_values = torch.randn(2, 3, 16, 16)
    noise = torch.arange(16.0).repeat(2, 1)
    expected = theirs(pixel_values=pixel_values, noise=noise).last_hidden_state
    assert torch.allclose(ours(pixel_values).last_hidden_state, expected, atol=1e-5)


LABELS = {
    "regression": (1, torch.tensor([0.5, -2.0, 3.0])),
    "single_label_classification": (5, torch.tensor([0, 4, 2])),
    "multi_label_classification": (5, torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])),
}


@pytest.mark.parametrize("said", [True, False], ids=["said", "told_from_labels"])
@pytest.mark.parametrize("problem_type", LABELS)
def test_the_loss_of_each_problem(tmp_path: Path, problem_type: str, said: bool) -> None:
    count, labels = LABELS[problem_type]
    keys = tiny_keys(ViTForImageClassification) | {"num_labels": count}
    keys |= {"problem_type": problem_type} if said else {}
    theirs = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**keys)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ViTForImageClassification.from_pretrained(tmp_path / "theirs")
    assert ours.config.problem_type == (problem_type if said else None)
    assert_equal(ours, theirs, labels=labels)
    ours.save_pretrained(tmp_path / "ours")
    again = open_theirs(tmp_path / "ours", "ViTForImageClassification")
    assert (again.config.num_labels, again.config.problem_type) == (count, ours.config.problem_type)
    assert_equal(ours, again, labels=labels)


def test_features_only(tmp_path: Path) -> None:
    """num_labels=0: both give the class token as logits."""
    theirs = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, num_labels=0)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ViTForImageClassification.from_pretrained(tmp_path / "theirs")
    given = {"pixel_values": inputs(ours)["pixel_values"]}
    assert torch.allclose(ours(**given).logits, theirs(**given).logits, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = open_theirs(tmp_path / "ours", "ViTForImageClassification")
    assert torch.allclose(again(**given).logits, theirs(**given).logits, atol=1e-5)


BEYOND: dict[str, Any] = {
    "use_cls_token": False, "num_register_tokens": 2, "position_embeddings": "none", "rope_theta": 100.0,
    "layer_scale_init_value": 0.1, "qk_norm": True, "swiglu": True, "pooling": "mean", "fc_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("key", BEYOND)
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_transformers_refuses_what_it_would_misread(
    tmp_path: Path, model_class: type[ViTPreTrainedModel], key: str
) -> None:
    keys = tiny_keys(model_class) | {key: BEYOND[key]}
    keys |= {"use_cls_token": {"pooling": "mean"}, "position_embeddings": {"rope_theta": 100.0}}.get(key, {})
    keys |= {"fc_norm": {"pooling": "mean"}}.get(key, {})
    if key == "fc_norm" and model_class in (ViTMAEForPreTraining, ViTForMaskedImageModeling):
        with pytest.raises(ConfigError):
            model_class(model_class.config_class(**keys))
        return
    ours = model_class(model_class.config_class(**keys))
    if key == "pooling" and model_class is ViTMAEForPreTraining:
        assert not ours.config.beyond_transformers
        return
    initialize(ours, 0)
    shaken(ours).save_pretrained(tmp_path)
    for name in ("AutoConfig", "AutoModel"):
        with pytest.raises(ValueError, match="vitscale_vit"):
            getattr(transformers, name).from_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config == ours.config
    given = inputs(ours)
    found, expected = again(**given), ours(**given)
    assert all(torch.equal(found[name], value) for name, value in expected.items() if isinstance(value, Tensor))


def test_multitask_opens_as_each_of_its_parts(tmp_path: Path) -> None:
    ours = ViTForMultitaskPreTraining(ViTForMultitaskPreTraining.config_class(**tiny_keys(ViTForMultitaskPreTraining)))
    initialize(ours, 0)
    save_ours(shaken(ours), tmp_path)
    given = inputs(ours)
    found = ours(**given)
    report: dict[str, Any]
    model, report = transformers.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.allclose(model.eval()(**given).logits, found.logits, atol=1e-5)
    model, report = transformers.ViTForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.allclose(model.eval()(**given).reconstruction, found.reconstruction, atol=1e-5)
    again = load_model(tmp_path)
    assert type(again) is ViTForMultitaskPreTraining
    assert torch.equal(again(**given).logits, found.logits)


def test_processor_opens_in_transformers(tmp_path: Path) -> None:
    import numpy as np

    ours = ViTForImageClassification(ViTForImageClassification.config_class(**tiny_keys(ViTForImageClassification)))
    initialize(ours, 0)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_model(tmp_path, "ViTForImageClassification", ours.config, ours.state_dict(), mean, std)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    made = processor(image, return_tensors="pt").pixel_values[0]
    expected = (image / 255 - np.array(mean)) / np.array(std)
    assert np.allclose(made.numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    assert processor(np.zeros((40, 30, 3), dtype=np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)
    assert int(processor.resample) == 3


def test_a_fine_tuned_autoencoder_pools_as_transformers_did(tmp_path: Path) -> None:
    """transformers' classifier sees the class token, whatever `pooling` an MAE of ours hands on in config.json."""
    ViTMAEForPreTraining(ViTMAEConfig(**tiny_keys(ViTMAEForPreTraining) | {"pooling": "mean"})).save_pretrained(
        tmp_path / "mae"
    )
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "mae", num_labels=3).eval()
    theirs.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["pooling"] == "mean"
    ours = ViTForImageClassification.from_pretrained(tmp_path / "tuned")
    pixels = torch.randn(2, ours.config.num_channels, *pair(ours.config.image_size))
    with torch.no_grad():
        assert torch.allclose(ours(pixels).logits, theirs(pixels).logits, atol=1e-5)
