"""transformers' other Vision Transformers, DINOv2 to I-JEPA: folders and files open here, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitscale
from tests.conversion.comparing import close, shaken
from vitscale.conversion.convert import convert
from vitscale.errors import CheckpointError, ConfigError
from vitscale.inference.model import load
from vitscale.interop.config_files import read_config
from vitscale.interop.loading import open_model, start_from
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.vit import ViTModel

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
WIDE = SIZES | {"intermediate_size": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", SIZES | {"mlp_ratio": 2, "layer_norm_eps": 1e-5}),
    "dinov2_swiglu": ("Dinov2", SIZES | {"use_swiglu_ffn": True, "qkv_bias": False, "image_size": 20}),
    "dinov2_with_registers": ("Dinov2WithRegisters", SIZES | {"num_register_tokens": 3, "hidden_act": "relu"}),
    "dinov3": ("DINOv3ViT", WIDE | {"num_register_tokens": 2, "image_size": 32, "patch_size": 8, "rope_theta": 50.0}),
    "dinov3_gated": ("DINOv3ViT", WIDE | {"use_gated_mlp": True, "hidden_act": "silu", "key_bias": True}),
    "vit_msn": ("ViTMSN", WIDE | {"num_channels": 1, "layer_norm_eps": 1e-3}),
    "ijepa": ("IJepa", WIDE | {"hidden_act": "gelu_new"}),
}
OPEN = ("num_attention_heads", "layer_norm_eps", "rope_theta", "image_size")  # what a file does not tell
every_kind = pytest.mark.parametrize("kind", KINDS)


def theirs(kind: str, head: str = "Model", **keys: Any) -> Any:
    name, sizes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**sizes | keys)
    return shaken(getattr(transformers, f"{name}{head}")(config))


def images(model: nn.Module, height: int | None = None, width: int | None = None) -> Tensor:
    config: Any = model.config
    return torch.randn(2, config.num_channels, height or config.image_size, width or config.image_size)


@torch.no_grad()
def assert_same(ours: Any, model: Any) -> None:
    pixels = images(model)
    close(ours(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize("original", [True, False], ids=["on_disk", "in_memory"])
@every_kind
def test_their_folder_opens_by_every_entrance(
    tmp_path: Path, kind: str, original: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the names that they save, and those of transformers 5 in memory."""
    model = theirs(kind)
    model.save_pretrained(tmp_path, save_original_format=original)
    capsys.readouterr()  # its progress
    ours, report = ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report.lines()
    assert_same(ours, model)
    assert not capsys.readouterr().err
    opened = open_model(tmp_path)
    assert type(opened.model) is type(vitscale.AutoModel.from_pretrained(tmp_path)) is ViTModel
    assert_same(opened.model, model)
    assert ours.config == vitscale.AutoConfig.from_pretrained(tmp_path)
    run = ViTForImageClassification(ours.config)
    initialize(run, 0)
    assert sorted(start_from(run, tmp_path).fresh) == ["classifier.bias", "classifier.weight"]
    assert_same(run.vit, model)


@every_kind
def test_their_file_alone(tmp_path: Path, kind: str) -> None:
    model = theirs(kind, **{} if "gated" in kind else {"hidden_act": "gelu"})
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    file = tmp_path / "model.safetensors"
    known = {name: getattr(model.config, name) for name in OPEN if hasattr(model.config, name)}
    opened = open_model(file, known)
    assert_same(opened.model, model)
    assert opened.tensors == len(load_file(file))
    assert any("mask_token" in note for note in opened.notes) == ("mask_token" in str(model.state_dict().keys()))
    torch.save({"teacher": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "t.pth")
    assert_same(ViTModel.from_pretrained(tmp_path / "t.pth", **known), model)


def test_what_a_file_alone_does_not_say_is_that_of_what_was_published(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 8, "mlp_ratio": 1, "num_register_tokens": 0}
    for kind, width, heads, eps in (("dinov2", 384, 6, 1e-6), ("dinov3", 1280, 20, 1e-5), ("ijepa", 1408, 16, 1e-12)):
        name, _ = KINDS[kind]
        config = getattr(transformers, f"{name}Config")(**sizes | {"hidden_size": width, "num_attention_heads": heads})
        model = getattr(transformers, f"{name}Model")(config)
        file = tmp_path / f"{kind}.safetensors"
        save_file(model.state_dict(), file)
        opened = open_model(file)
        assert (opened.model.config.num_attention_heads, opened.model.config.layer_norm_eps) == (heads, eps)
        assert opened.model.config.rope_theta == (100.0 if kind == "dinov3" else None)


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 24), (16, 48), (24, 24)])
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3", "vit_msn", "ijepa"])
def test_other_resolutions(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    pixels = images(model, *size)
    more = {"interpolate_pos_encoding": True} if kind in ("vit_msn", "ijepa") else {}
    expected = model(pixels, **more).last_hidden_state
    close(ViTModel.from_pretrained(tmp_path, image_size=size)(pixels).last_hidden_state, expected)
    if kind != "dinov2_with_registers":  # which filters positions as it resizes them: only what a folder holds can be
        close(ViTModel.from_pretrained(tmp_path)(pixels, interpolate_pos_encoding=True).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit_msn", "ijepa"])
def test_a_classifier(tmp_path: Path, kind: str) -> None:
    names = {0: "cat", 1: "dog", 2: "owl"}
    model = theirs(kind, "ForImageClassification", id2label=names, label2id={name: i for i, name in names.items()})
    model.save_pretrained(tmp_path)
    ours = vitscale.AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = images(model)
    close(ours(pixels).logits, model(pixels).logits)
    assert ours.config.id2label == names
    opened = open_model(tmp_path)
    assert isinstance(opened.model, ViTForImageClassification)
    close(opened.model(pixels).logits, model(pixels).logits)
    (tmp_path / "config.json").unlink()
    known = {name: getattr(model.config, name) for name in OPEN if hasattr(model.config, name)}
    bare, state = open_model(tmp_path / "model.safetensors", known).model, ours.state_dict()
    assert type(bare) is ViTForImageClassification
    assert all(torch.equal(value, state[name]) for name, value in bare.state_dict().items())


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_a_classifier_of_token_and_mean_is_left_out(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = theirs(kind, "ForImageClassification", num_labels=5)
    model.save_pretrained(tmp_path)
    said = "a classifier of the class token and the patches' mean together: classifier.bias, classifier.weight"
    opened = open_model(tmp_path)
    assert any(said in note for note in opened.notes)
    assert_same(opened.model, getattr(model, model.base_model_prefix))
    _, report = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(report.fresh) == ["classifier.bias", "classifier.weight"]
    assert said in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert any(said in note for note in open_model(tmp_path / "model.safetensors", {"num_attention_heads": 4}).notes)


def test_a_pooler_of_the_first_patch_is_left_out(tmp_path: Path) -> None:
    config = transformers.IJepaConfig(**KINDS["ijepa"][1])
    model = shaken(transformers.IJepaModel(config, add_pooling_layer=True))
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert any("a pooler of the first patch" in note for note in opened.notes)
    assert_same(opened.model, model)


@pytest.mark.parametrize("target", ["vitscale", "timm", "hf"])
@every_kind
def test_converted_and_back(tmp_path: Path, kind: str, target: str) -> None:
    keys = {"hidden_act": "silu" if "gated" in kind else "gelu"} if target == "timm" else {}
    model = theirs(kind, **keys | {"layer_norm_eps": 1e-6})
    model.save_pretrained(tmp_path / "theirs")
    if target == "hf" and kind != "vit_msn":
        with pytest.raises(ConfigError, match=r"(layer_scale_init_value|use_cls_token)=.*--to vitscale writes"):
            convert(tmp_path / "theirs", tmp_path / "to", target)
        return
    report = convert(tmp_path / "theirs", tmp_path / "to", target)
    assert report.tensors >= 30
    assert_same(ViTModel.from_pretrained(tmp_path / "to"), model)
    if target == "hf":
        again = transformers.ViTModel.from_pretrained(tmp_path / "to").eval()
        assert_same(again, model)


def config_json(tmp_path: Path, kind: str, **changes: Any) -> Path:
    theirs(kind).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("dinov3", {"proj_bias": False}, "proj_bias=False: must be true, since"),
        ("dinov3", {"mlp_bias": False}, "mlp_bias=False: must be true, since"),
        ("dinov3_gated", {"hidden_act": "gelu"}, "hidden_act='gelu': must be silu where use_gated_mlp=true"),
        ("dinov3", {"use_gated_mlp": "yes"}, "use_gated_mlp='yes': must be true or false"),
        ("dinov3", {"rope_theta": 0}, "rope_theta=0.0: must be above 0"),
        ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio='4': must be a number"),
        ("dinov2", {"mlp_ratio": 0}, "mlp_ratio=0: must be above 0"),
        ("dinov2", {"hidden_act": "prelu"}, "hidden_act='prelu': must be one of gelu"),
        ("dinov2", {"quantization_config": {"bits": 8}}, "quantization_config=.*: its weights are quantized"),
        ("vit_msn", {"hidden_size": "32"}, "hidden_size='32': must be a whole number"),
        ("dinov2", {"mlp_ratio": 3}, r"tensors of another shape: .*\[64\] instead of \[96\]"),
        ("dinov2_with_registers", {"num_register_tokens": 0}, "unexpected: embeddings.register_tokens"),
        ("dinov2", {"num_hidden_layers": 3}, "tensors missing: encoder.layer.2"),
    ],
)
def test_values_that_no_config_expresses_are_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    folder = config_json(tmp_path, kind, **changes)
    with pytest.raises(CheckpointError, match=said) as error:
        open_model(folder)
    assert "\n" not in str(error.value)


def test_keys_that_change_nothing_are_passed_over_and_others_named(tmp_path: Path) -> None:
    silent = {"pos_embed_rescale": 3.0, "return_class_token": True, "swiglu": True, "num_register_tokens": None}
    folder = config_json(tmp_path, "dinov3_gated", **silent)
    assert open_model(folder).notes[:-1] == []
    folder = config_json(tmp_path, "dinov3_gated", use_magic=True)
    assert open_model(folder).notes[0] == "config.json: passed over, no keys of a dinov3_vit: use_magic"


BIT = {
    "crop_size": {"height": 8, "width": 8}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.1, 0.2, 0.3], "image_processor_type": "BitImageProcessor",
    "image_std": [0.4, 0.5, 0.6], "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": 12},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_gated"])
def test_images_of_the_processors_size(tmp_path: Path, kind: str) -> None:
    """DINOv2's are of 224 pixels, its positions for 518."""
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(BIT))
    loaded = load(str(tmp_path), "cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    pixels = loaded.processor(picture, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 8, 8)
    assert loaded.model.config.image_size == 8
    close(loaded.model(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert open_model(tmp_path).model.config.image_size == 16  # to be converted: as it is
    assert vitscale.AutoImageProcessor.from_pretrained(tmp_path).image_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", ["BitImageProcessor", "DINOv3ViTImageProcessor"])
def test_what_their_processors_start_from(tmp_path: Path, name: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": f"{name}Fast"}))
    ours = vitscale.ViTImageProcessor.from_pretrained(tmp_path)
    usual = getattr(transformers, name)
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        assert getattr(ours, key) == bool(getattr(usual, key, None)), key
    assert (int(ours.resample), list(ours.image_mean)) == (int(usual.resample), list(usual.image_mean))
    assert ours.size == dict(usual.size)


def test_tensors_that_have_no_place_are_named(tmp_path: Path) -> None:
    theirs("dinov2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = "encoder.layer.0.attention.attention.key.bias"
    extra = {"adapter.weight": torch.ones(2), "encoder.layer.0.attention.k_proj.bias": state[name].clone()}
    save_file(state | extra, file)
    with pytest.raises(CheckpointError, match=r"unexpected: adapter.weight, .*key.bias \(again\)"):
        open_model(tmp_path)
    save_file({each: value for each, value in state.items() if each != name}, file)
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        open_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"unexpected: .*query.bias"):
        open_model(file, {"num_attention_heads": 4})


@every_kind
def test_defaults_are_theirs(kind: str) -> None:
    """What a config.json leaves out is as transformers has it."""
    config = getattr(transformers, f"{KINDS[kind][0]}Config")()
    full = read_config(Path("config.json"), json.loads(config.to_json_string(use_diff=False)))
    assert read_config(Path("config.json"), {"model_type": config.model_type}) == full
