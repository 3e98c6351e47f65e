"""A folder's weights in another class, with another head, other channels, another size: taken, new, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.shapes import TRAINABLE, tiny
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.channels import adapt_channels
from vitscale.interop.loading import LoadReport, start_from
from vitscale.interop.pretrained import load_model, processor_dict
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.positions import interpolate_positions
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

HEAD = ["classifier.bias", "classifier.weight"]
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def save(model: ViTPreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(model_class: type[Any], folder: Path, **options: Any) -> tuple[Any, LoadReport]:
    return model_class.from_pretrained(folder, output_loading_info=True, **options)


def encoder(model: ViTPreTrainedModel) -> ViTModel:
    return model if isinstance(model, ViTModel) else model.vit


@pytest.mark.parametrize("target", TRAINABLE, ids=lambda c: c.__name__)
@pytest.mark.parametrize("source", [ViTModel, *TRAINABLE], ids=lambda c: c.__name__)
def test_every_class_from_every_class(
    tmp_path: Path,
    source: type[ViTPreTrainedModel],
    target: type[ViTPreTrainedModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The encoder's features are the source's; every parameter is the source's or in `fresh`."""
    ours = tiny(source).eval()
    model, report = load(target, save(ours, tmp_path))
    assert type(model) is target
    assert not model.training
    features = encoder(model)(PIXELS).last_hidden_state
    assert torch.equal(features, encoder(ours)(PIXELS).last_hidden_state)
    prefix = "vit." if source is ViTModel else ""
    before = {prefix + name: value for name, value in ours.named_parameters()}
    after = dict(model.named_parameters())
    used = after.keys() - set(report.fresh)
    assert all(torch.equal(after[name], before[name]) for name in used)
    fixed = {"decoder.decoder_pos_embed"}  # of the MAE alone: no parameter, but a tensor of the folder
    assert set(report.unused) - fixed == before.keys() - used
    anew = target(model.config)
    initialize(anew, 0)
    assert all(torch.equal(after[name], anew.get_parameter(name)) for name in report.fresh)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(report.fresh) + bool(report.unused)
    if report.fresh:
        assert re.match(rf"{re.escape(str(tmp_path))}, as a {target.__name__}: new, to be trained: ", said[0])


def test_the_encoder_alone(tmp_path: Path) -> None:
    classifier = tiny(ViTForImageClassification).eval()
    model, report = load(ViTModel, save(classifier, tmp_path))
    assert (report.fresh, report.unused) == ([], HEAD)
    assert model.pooler is None
    model, report = load(ViTModel, tmp_path, add_pooling_layer=True, use_mask_token=True)
    assert report.fresh == ["embeddings.mask_token", "pooler.dense.bias", "pooler.dense.weight"]
    assert model.pooler.dense.bias.abs().sum() == 0
    assert torch.equal(model(PIXELS).last_hidden_state, classifier.vit(PIXELS).last_hidden_state)
    with pytest.raises(ConfigError, match="add_pooling_layer: is for ViTModel"):
        load(ViTForImageClassification, tmp_path, add_pooling_layer=True)


def test_an_mae_as_encoder_keeps_its_positions(tmp_path: Path) -> None:
    mae = tiny(ViTMAEForPreTraining).eval()
    model, report = load(ViTModel, save(mae, tmp_path))
    assert type(model.config) is ViTConfig
    assert model.config.position_embeddings == "sincos"
    assert model.config.mask_ratio == ViTConfig().mask_ratio
    assert all(name.startswith("decoder.") for name in report.unused)
    learned, report = load(ViTForImageClassification, tmp_path, position_embeddings="learned", num_labels=3)
    assert report.fresh == HEAD
    assert torch.equal(learned.vit.embeddings.position_embeddings.detach(), mae.vit.embeddings.position_embeddings)


def test_another_number_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = tiny(ViTForImageClassification, id2label={i: f"kind {i}" for i in range(5)})
    save(ours, tmp_path)
    for asked in ({"num_labels": 7}, {"id2label": dict.fromkeys(range(7), "x")}):
        with pytest.raises(CheckpointError) as error:
            load(ViTForImageClassification, tmp_path, **asked)
        text = str(error.value)
        assert "\n" not in text
        assert "num_labels=5, and 7 are asked for" in text
        assert "ignore_mismatched_sizes=True" in text
    capsys.readouterr()
    model, report = load(ViTForImageClassification, tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (7, 16)
    assert (model.config.num_labels, model.config.has_class_names) == (7, False)
    assert report.fresh == HEAD
    assert report.mismatched == ["classifier.bias [5] instead of [7]", "classifier.weight [5, 16] instead of [7, 16]"]
    assert "of another shape: classifier.bias" in capsys.readouterr().err
    assert torch.equal(model.vit(PIXELS).last_hidden_state, ours.eval().vit(PIXELS).last_hidden_state)
    same, report = load(ViTForImageClassification, tmp_path, num_labels=5)
    assert report == LoadReport()
    assert same.config.id2label == ours.config.id2label
    renamed, _ = load(ViTForImageClassification, tmp_path, id2label={i: str(i) for i in range(5)})
    assert renamed.config.label2id == {str(i): i for i in range(5)}
    assert torch.equal(renamed.classifier.weight, ours.classifier.weight)
    bare, report = load(ViTForImageClassification, tmp_path, num_labels=0)
    assert report.unused == HEAD
    assert torch.equal(bare(PIXELS).logits, ours.vit(PIXELS).last_hidden_state[:, 0])
    with pytest.raises(ConfigError, match="num_labels=3: must be 7"):
        load(ViTForImageClassification, tmp_path, num_labels=3, id2label=dict.fromkeys(range(7), "x"))


def test_other_channels(tmp_path: Path) -> None:
    ours = tiny(ViTForImageClassification)
    model, report = load(ViTForImageClassification, save(ours, tmp_path), num_channels=4)
    weight = "vit.embeddings.patch_embeddings.projection.weight"
    assert report.adapted == [f"{weight} 3 to 4 channels"]
    assert torch.equal(model.get_parameter(weight), adapt_channels(ours.get_parameter(weight), 4))
    assert model(torch.randn(1, 4, 16, 16)).logits.shape == (1, 5)
    save(tiny(ViTForMaskedImageModeling), tmp_path)
    with pytest.raises(CheckpointError, match=r"decoder\.0\.bias \[48\] instead of \[64\].*ignore_mismatched_sizes"):
        load(ViTForMaskedImageModeling, tmp_path, num_channels=4)
    model, report = load(ViTForMaskedImageModeling, tmp_path, num_channels=4, ignore_mismatched_sizes=True)
    assert report.fresh == ["decoder.0.bias", "decoder.0.weight"]
    assert len(report.adapted) == 1


def test_another_image_size(tmp_path: Path) -> None:
    """Learned positions are interpolated, fixed ones computed; the result is the one of interpolate_pos_encoding."""
    ours = tiny(ViTForImageClassification).eval()
    model, report = load(ViTForImageClassification, save(ours, tmp_path), image_size=(24, 32))
    name = "vit.embeddings.position_embeddings"
    assert report.adapted == [f"{name} 4x4 to 6x8 patches"]
    assert torch.equal(model.get_parameter(name), interpolate_positions(ours.get_parameter(name), (4, 4), (6, 8)))
    pixels = torch.randn(1, 3, 24, 32)
    assert torch.allclose(model(pixels).logits, ours(pixels, interpolate_pos_encoding=True).logits, atol=1e-6)
    mae, report = load(ViTMAEForPreTraining, save(tiny(ViTMAEForPreTraining), tmp_path), image_size=24)
    assert report == LoadReport()
    assert mae.config.num_patches == 36
    fixed = tiny(ViTMAEForPreTraining, image_size=24)
    assert torch.equal(mae.vit.embeddings.position_embeddings, fixed.vit.embeddings.position_embeddings)


@pytest.mark.parametrize("model_class", [ViTModel, ViTMAEForPreTraining], ids=lambda c: c.__name__)
def test_another_grid_of_as_many_patches(tmp_path: Path, model_class: type[ViTPreTrainedModel]) -> None:
    """The grid tells where a position is, not the number of patches."""
    ours = tiny(model_class, image_size=(8, 32), position_embeddings="learned")
    model, report = load(model_class, save(ours, tmp_path), image_size=16)
    names = [name for name, _ in ours.named_parameters() if "position_embeddings" in name or "pos_embed" in name]
    assert report.adapted == [f"{name} 2x8 to 4x4 patches" for name in names]
    for name in names:
        expected = interpolate_positions(ours.get_parameter(name), (2, 8), (4, 4))
        assert torch.equal(model.get_parameter(name), expected)
        assert not torch.equal(expected, ours.get_parameter(name))
    assert load(model_class, tmp_path)[1] == LoadReport()


def test_starting_from_another_grid_of_as_many_patches(tmp_path: Path) -> None:
    save(tiny(ViTForMaskedImageModeling, image_size=(8, 32)), tmp_path)
    with pytest.raises(CheckpointError, match=r"position_embeddings 2x8 instead of 4x4 patches"):
        start_from(tiny(ViTForImageClassification), tmp_path)
    assert start_from(tiny(ViTForImageClassification, position_embeddings="sincos"), tmp_path).fresh == HEAD


@pytest.mark.parametrize("name", ["cls_token", "position_embeddings", "patch_embeddings.projection.weight"])
def test_tensors_of_another_rank(tmp_path: Path, name: str) -> None:
    path = save(tiny(ViTModel), tmp_path) / "model.safetensors"
    save_file(load_file(path) | {f"embeddings.{name}": torch.tensor(1.0)}, path)
    for change in ({}, {"num_channels": 4, "image_size": 24}):
        with pytest.raises(CheckpointError, match=rf"embeddings\.{name} \[\] instead of \["):
            load(ViTModel, tmp_path, **change)
    with pytest.raises(CheckpointError, match=rf"embeddings\.{name} \[\] instead of \["):
        load_model(tmp_path)


def test_an_encoder_of_other_sizes_is_refused(tmp_path: Path) -> None:
    save(tiny(ViTForImageClassification), tmp_path)
    for asked, said in (
        ({"hidden_size": 32}, "hidden_size=16, not 32"),
        ({"num_hidden_layers": 4}, r"missing: vit\.encoder\.layers\.3.*num_hidden_layers=3, not 4"),
        ({"patch_size": 8}, "patch_size=4, not 8"),
        ({"layer_scale_init_value": 0.1}, "missing: vit.encoder.layers.0.layer_scale_after"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load(ViTForImageClassification, tmp_path, ignore_mismatched_sizes=True, **asked)


def test_keys_that_there_are_not(tmp_path: Path) -> None:
    save(tiny(ViTForImageClassification), tmp_path)
    for asked, said in (
        ({"num_label": 3}, "num_label=3: ViTConfig has no such key; did you mean num_labels?"),
        ({"torch_dtype": "auto"}, "did you mean dtype?"),
        ({"trust_remote_code": True}, "no such key"),
        ({"dtype": "int8"}, "dtype='int8': must be"),
        ({"dtype": "float23"}, "dtype='float23': must be"),
        ({"revision": "v2"}, "revision='v2': is for the hub"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            load(ViTForImageClassification, tmp_path, **asked)


def test_keys_that_change_no_weight(tmp_path: Path) -> None:
    model, report = load(
        ViTForImageClassification,
        save(tiny(ViTForImageClassification), tmp_path),
        drop_path_rate=0.2,
        problem_type="multi_label_classification",
    )
    assert report == LoadReport()
    assert (model.config.drop_path_rate, model.config.problem_type) == (0.2, "multi_label_classification")


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    save(tiny(ViTForImageClassification), tmp_path)
    config = ViTConfig.from_pretrained(tmp_path, label_smoothing=0.1)
    assert load(ViTForImageClassification, tmp_path, config=config)[0].config == config
    wider = ViTConfig.from_pretrained(tmp_path, num_labels=6)
    with pytest.raises(CheckpointError, match="6 are asked for"):
        load(ViTForImageClassification, tmp_path, config=wider)


def test_types(tmp_path: Path) -> None:
    ours = tiny(ViTForImageClassification)
    save(ours.to(torch.bfloat16), tmp_path)
    for asked, expected in ((None, torch.float32), ("auto", torch.bfloat16), ("float64", torch.float64)):
        model = ViTForImageClassification.from_pretrained(tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_a_patch_of_another_size_gets_a_decoder_that_fits(tmp_path: Path) -> None:
    """A plain ViT's encoder_stride says nothing of its weights: SimMIM's decoder takes the patch size."""
    save(tiny(ViTModel, patch_size=8, encoder_stride=16), tmp_path)
    model, report = load(ViTForMaskedImageModeling, tmp_path)
    assert model.config.encoder_stride == 8
    assert report.fresh[:2] == ["decoder.0.bias", "decoder.0.weight"]
    assert "vit.embeddings.mask_token" in report.fresh


def test_the_mean_of_an_encoder_with_its_norm(tmp_path: Path) -> None:
    """fc_norm puts the last norm behind the pooling: the encoder's own is named as not used."""
    save(tiny(ViTMAEForPreTraining), tmp_path)
    model, report = load(ViTForImageClassification, tmp_path, pooling="mean", fc_norm=True, num_labels=4)
    assert report.fresh == [*HEAD, "fc_norm.bias", "fc_norm.weight"]
    assert {"vit.layernorm.bias", "vit.layernorm.weight"} <= set(report.unused)
    assert model(PIXELS).logits.shape == (2, 4)


def test_a_folder_that_names_no_class_of_ours(tmp_path: Path) -> None:
    """transformers writes none for a bare config, and a user's own name for a class of theirs."""
    ours = tiny(ViTForImageClassification).eval()
    save(ours, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for architectures in (None, [], ["TheirOwnViT"]):
        (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": architectures}))
        model, report = load(ViTForImageClassification, tmp_path)
        assert report == LoadReport()
        assert torch.equal(model(PIXELS).logits, ours(PIXELS).logits)
        with pytest.raises(CheckpointError, match="architectures"):
            load_model(tmp_path)
    save(tiny(ViTModel), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": None}))
    assert load(ViTForImageClassification, tmp_path)[1].fresh == HEAD


def test_a_tensor_too_many_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tiny(ViTForImageClassification), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"vit.pooler.dense.bias": torch.zeros(16)}, path)
    _, report = load(ViTForImageClassification, tmp_path)
    assert report == LoadReport(unused=["vit.pooler.dense.bias"])
    assert "not used: vit.pooler.dense.bias" in capsys.readouterr().err
    del tensors["classifier.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight"):
        load(ViTForImageClassification, tmp_path, ignore_mismatched_sizes=True)


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    class Probe(ViTForImageClassification):
        pass

    ours = Probe(tiny(ViTForImageClassification).config)
    initialize(ours, 3)
    save(ours, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Probe"]
    again, report = load(Probe, tmp_path)
    assert type(again) is Probe
    assert report == LoadReport()
    assert torch.equal(again.classifier.weight, ours.classifier.weight)


def test_a_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: mine}\n")
    with pytest.raises(CheckpointError, match=re.escape(f"`vitscale export {tmp_path}`")):
        load(ViTModel, tmp_path)
    save(tiny(ViTMAEForPreTraining), tmp_path / "model")
    assert load(ViTMAEForPreTraining, tmp_path)[1] == LoadReport()
    assert start_from(tiny(ViTForImageClassification), tmp_path).fresh == HEAD


def test_configs(tmp_path: Path) -> None:
    mae = tiny(ViTMAEForPreTraining, mask_ratio=0.5).config
    mae.save_pretrained(tmp_path)
    assert ViTMAEConfig.from_pretrained(tmp_path) == mae
    plain = ViTConfig.from_pretrained(tmp_path, num_labels=3)
    assert (type(plain), plain.num_labels, plain.hidden_size) == (ViTConfig, 3, 16)
    odd = tiny(ViTModel, use_cls_token=False, pooling="mean", image_size=(16, 32), rope_theta=100.0).config
    odd.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vitscale_vit"
    assert ViTConfig.from_pretrained(tmp_path) == odd
    with pytest.raises(ConfigError, match="did you mean hidden_size"):
        ViTConfig.from_pretrained(tmp_path, hidden_sise=3)


def test_the_processor_is_left_alone(tmp_path: Path) -> None:
    """Saving a model again into its folder keeps the processor that lies there, as transformers does."""
    model = tiny(ViTForMultitaskPreTraining)
    content = json.dumps(processor_dict(model.config, (0.5,), (0.5,)))
    save(model, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    save(model, tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == content


def test_a_file_beside_a_models_own_weights_is_not_taken_for_them(tmp_path: Path) -> None:
    """Neither kind: the named file is read, or nothing is."""
    model = tiny(ViTForImageClassification)
    model.save_pretrained(tmp_path)
    other = {name: value + 1 for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(other, tmp_path / "ema.safetensors")
    named = {"image_size": 8, "patch_size": 4}
    with pytest.raises(ConfigError, match="num_attention_heads"):
        ViTForImageClassification.from_pretrained(tmp_path / "ema.safetensors", **named)
    same = ViTForImageClassification.from_pretrained(tmp_path / "model.safetensors")
    assert torch.equal(same.classifier.weight, model.classifier.weight)
