"""Folders of models: whole, strict, and clear about what is wrong with them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.shapes import TRAINABLE, inputs, tiny
from vitscale.config.schema import Model, Objective, RunConfig
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.auto import AutoModelForPreTraining
from vitscale.interop.keymaps import canonical, place
from vitscale.interop.loading import LoadReport, start_from
from vitscale.interop.pretrained import load_model, read_model, save_model, save_run_model
from vitscale.models.auto import build_model, initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

PARTS = ("query", "key", "value")


def save(model: ViTPreTrainedModel, folder: Path) -> Path:
    save_model(folder, type(model).__name__, model.config, model.state_dict(), (0.5,), (0.25,))
    return folder


@pytest.mark.parametrize("model_class", [ViTModel, *TRAINABLE], ids=lambda c: c.__name__)
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_there_and_back(tmp_path: Path, model_class: type[ViTPreTrainedModel], positions: str) -> None:
    model = tiny(model_class, position_embeddings=positions, drop_path_rate=0.1, image_size=(16, 24), qkv_bias=False)
    again = load_model(save(model, tmp_path))
    assert type(again) is model_class
    assert again.config == model.config
    assert not again.training
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for (name, value), other in zip(model.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_a_runs_state_is_arrays(tmp_path: Path) -> None:
    """As a checkpoint gives it: NumPy, parameters only, from the run's own config."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model_keys = Model(**sizes, image_size=8, patch_size=4, num_channels=2)
    config = RunConfig(model=model_keys, objective=Objective(name="simmim"))
    config = replace(config, augment=replace(config.augment, mean=(0.5,), std=(0.2, 0.3)))
    model = build_model(config)
    initialize(model, 3)
    save_run_model(tmp_path, config, {name: p.detach().numpy() for name, p in model.named_parameters()})
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 8, "width": 8}
    assert (processor["image_mean"], processor["image_std"]) == ([0.5, 0.5], [0.2, 0.3])
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["layer_norm_eps"] == 1e-6
    assert content["architectures"] == ["ViTForMaskedImageModeling"]


def test_a_bare_encoder_is_as_it_was(tmp_path: Path) -> None:
    """A ViTModel has a pooler and a mask token or not; the file tells."""
    config = tiny(ViTModel).config
    for pooler in (False, True):
        for mask in (False, True):
            model = ViTModel(config, add_pooling_layer=pooler, use_mask_token=mask)
            initialize(model, 0)
            again = load_model(save(model, tmp_path))
            assert ((again.pooler is not None), (again.embeddings.mask_token is not None)) == (pooler, mask)


def test_saving_is_strict(tmp_path: Path) -> None:
    model = tiny(ViTForMaskedImageModeling)
    state = model.state_dict()
    del state["decoder.0.bias"]
    state |= {"extra": torch.zeros(1), "vit.layernorm.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        save_model(tmp_path / "out", "ViTForMaskedImageModeling", model.config, state, (0.5,), (0.5,))
    assert "missing: decoder.0.bias" in str(error.value)
    assert "unexpected: extra" in str(error.value)
    assert "vit.layernorm.weight [3] instead of [16]" in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="image_mean"):
        save_model(tmp_path, "ViTForMaskedImageModeling", model.config, model.state_dict(), (0.5, 0.5), (0.5,))


def test_loading_is_strict(tmp_path: Path) -> None:
    path = save(tiny(ViTForImageClassification), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    missing = "vit.encoder.layer.1.attention.attention.key.weight"
    save_file({name: value for name, value in tensors.items() if name != missing}, path)
    with pytest.raises(CheckpointError, match=f"missing: {missing}"):
        load_model(tmp_path)
    save_file(tensors | {"vit.embeddings.mask_token": torch.zeros(1, 1, 16)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected: vit\.embeddings\.mask_token"):
        load_model(tmp_path)
    save_file(tensors | {"classifier.weight": torch.zeros(7, 16)}, path)
    with pytest.raises(CheckpointError, match=r"classifier\.weight \[7, 16\] instead of \[5, 16\]"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "shapes",
    [([20, 16], [12, 16], [16, 16]), ([16, 8], [16, 16], [16, 16]), ([16, 16], [16, 16], []), ([], [], [])],
    ids=str,
)
def test_query_key_and_value_of_unlike_shapes(tmp_path: Path, shapes: tuple[list[int], ...]) -> None:
    path = save(tiny(ViTModel), tmp_path) / "model.safetensors"
    stem = "encoder.layer.1.attention.attention."
    parts = {f"{stem}{part}.weight": torch.zeros(shape) for part, shape in zip(PARTS, shapes, strict=True)}
    save_file(load_file(path) | parts, path)
    said = ", ".join(f"{name} {list(value.shape)}" for name, value in parts.items())
    with pytest.raises(CheckpointError, match=re.escape(f"tensors {said}: must be of one shape")):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_class", [ViTMAEForPreTraining, ViTModel], ids=lambda c: c.__name__)
def test_a_table_in_the_files_precision(
    tmp_path: Path, model_class: type[ViTPreTrainedModel], dtype: torch.dtype
) -> None:
    """As whoever casts every tensor writes it; one place in the last bit may be another, no more."""
    model = tiny(model_class, hidden_size=64, position_embeddings="sincos", image_size=56)
    path = save(model, tmp_path) / "model.safetensors"
    tensors = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(tensors, path)
    again = load_model(tmp_path)
    assert again.config == model.config
    for (name, value), other in zip(model.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(value, other), name
    name = next(name for name in tensors if name.endswith("embeddings.position_embeddings"))
    save_file(tensors | {name: tensors[name] * (1 + 4 * torch.finfo(dtype).eps) + 1e-4}, path)
    with pytest.raises(CheckpointError, match="is not the sincos table"):
        load_model(tmp_path)


@pytest.mark.parametrize("named", [[["a"]], [{}], [3], 3, "ViTModel", {"ViTModel": 1}, True, [None]], ids=str)
def test_architectures_that_are_no_names(tmp_path: Path, named: object) -> None:
    path = save(tiny(ViTModel), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": named}))
    for load in (load_model, ViTModel.from_pretrained, AutoModelForPreTraining.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            load(tmp_path)
        assert str(error.value).startswith(f"{path}: architectures={named!r}: must be a list")


def test_a_table_that_is_not_the_promised_one(tmp_path: Path) -> None:
    path = save(tiny(ViTMAEForPreTraining), tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"decoder.decoder_pos_embed": torch.zeros(1, 17, 8)}, path)
    with pytest.raises(CheckpointError, match=r"decoder_pos_embed is not the sincos table"):
        load_model(tmp_path)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_model(tmp_path)
    save(tiny(ViTModel), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        load_model(tmp_path)
    weights.write_bytes(whole)
    content = json.loads(config.read_text())
    for change, said in (
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"model_type": "bert"}, "bert"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"image_size": 15}, "image_size"),
        ({"hidden_size": "wide"}, "config.json"),
    ):
        config.write_text(json.dumps(content | change))
        with pytest.raises(CheckpointError, match=said):
            load_model(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        load_model(tmp_path)


def test_starting_from_another_objectives_weights(tmp_path: Path) -> None:
    """MAE's encoder, fixed positions included, into a classifier with learned ones."""
    mae = tiny(ViTMAEForPreTraining)
    model = tiny(ViTForImageClassification)
    initialize(model, 9)
    report = start_from(model, save(mae, tmp_path))
    assert report.fresh == ["classifier.bias", "classifier.weight"]
    assert report.unused
    assert all(name.startswith("decoder.") for name in report.unused)
    assert torch.equal(model.vit.embeddings.position_embeddings, mae.vit.embeddings.position_embeddings)
    pixels = inputs(mae)["pixel_values"]
    assert torch.equal(model.vit(pixels).last_hidden_state, mae.vit(pixels).last_hidden_state)


def test_starting_from_the_same_and_from_a_bare_encoder(tmp_path: Path) -> None:
    first, second = tiny(ViTForMultitaskPreTraining), tiny(ViTForMultitaskPreTraining)
    initialize(second, 1)
    assert start_from(second, save(first, tmp_path / "a")) == LoadReport()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    report = start_from(second, save(tiny(ViTModel), tmp_path / "b"))
    assert report.fresh[-1] == "vit.embeddings.mask_token"
    assert report.unused == ["vit.pooler.dense.bias", "vit.pooler.dense.weight"]


def test_starting_from_another_size_is_refused_whole(tmp_path: Path) -> None:
    folder = save(tiny(ViTForImageClassification, num_hidden_layers=2, image_size=32), tmp_path)
    model = tiny(ViTForMaskedImageModeling)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: vit\.encoder\.layers\.2.*position_embeddings \[1, 65, 16\]"):
        start_from(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_files_load_as_float32(tmp_path: Path) -> None:
    model = tiny(ViTForImageClassification)
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    save_model(tmp_path, "ViTForImageClassification", model.config, state, (0.5,), (0.5,))
    again = load_model(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_names_on_disk() -> None:
    qkv = place("vit.encoder.layers.3.attention.attention.qkv.bias")
    assert qkv.names == tuple(f"vit.encoder.layer.3.attention.attention.{part}.bias" for part in PARTS)
    assert place("decoder.transformer.layers.0.attention.output.weight").names == (
        "decoder.decoder_layers.0.attention.output.dense.weight",
    )
    assert place("encoder.layers.11.mlp.fc2.bias").names == ("encoder.layer.11.output.dense.bias",)
    assert canonical("decoder.decoder_encoder.layer.1.x") == "decoder.decoder_layers.1.x"


def test_reading_gives_arrays_their_rows(tmp_path: Path) -> None:
    """Query, key and value of the file are thirds of our matrix, in this order."""
    model = tiny(ViTModel)
    tensors = load_file(save(model, tmp_path) / "model.safetensors")
    fused = read_model(tmp_path).state["encoder.layers.0.attention.attention.qkv.weight"].numpy()
    parts = [tensors[f"encoder.layer.0.attention.attention.{part}.weight"].numpy() for part in PARTS]
    assert np.array_equal(fused, np.concatenate(parts))
