"""Files of weights as other frameworks write them: wrappers and prefixes off, harmless classes in, nothing run."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import os
import pathlib
import re
import subprocess
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conversion.comparing import close, shaken
from tests.models.shapes import TINY
from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.bare import read_bare
from vitscale.interop.checkpoints import Checkpoint, read_checkpoint
from vitscale.interop.loading import open_model, start_from
from vitscale.models.auto import initialize
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel

timm = pytest.importorskip("timm")
HEADS = {"num_attention_heads": 4}


def encoder(**arguments: Any) -> nn.Module:
    keys = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    return shaken(timm.models.VisionTransformer(**keys | arguments))


STATE = encoder().state_dict()


def under(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def read(tmp_path: Path, content: Any, take: str | None = None, **options: Any) -> Checkpoint:
    path = tmp_path / "weights.ckpt"
    torch.save(content, path, **options)
    return read_checkpoint(path, take)


def same(checkpoint: Checkpoint, state: dict[str, Tensor] = STATE) -> None:
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.tensors[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ({"net": {"params": STATE}, "iter": 3}, ["under 'net.params'"]),
        ({"run": {"state": {"models": {"vit": {"0": under("trunk.")}}}}}, ["'trunk.'", "'run.state.models.vit.0'"]),
        ({"w": {n: v.numpy().astype(">f4") for n, v in STATE.items()}, "rng": np.random.get_state()}, ["under 'w'"]),
        ({"model_state_dict": under("_fsdp_wrapped_module.module.")}, ["'_fsdp_wrapped_module.module.'"]),
        (
            {"state_dict": under("student.net.trunk.") | {"loss.weight": torch.ones(2)}},
            ["'student.net.trunk.'", "loss."],
        ),
        (under("module.") | {"n_averaged": torch.tensor(3)}, ["'module.'", "n_averaged"]),
        (
            {"model": under("whatever_people_call_it."), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
            ["what"],
        ),
        ({"teacher": under("backbone.") | {"dino_head.mlp.0.weight": torch.ones(2, 2)}}, ["'backbone.'", "dino_head."]),
    ],
)
def test_wrappers_and_prefixes_are_taken_off_and_noted(tmp_path: Path, content: Any, notes: list[str]) -> None:
    checkpoint = read(tmp_path, content)
    same(checkpoint)
    for text in notes:
        assert any(text in note for note in checkpoint.notes), checkpoint.notes


@pytest.mark.parametrize(
    ("content", "usual", "other"),
    [
        ({"state_dict": STATE, "state_dict_ema": STATE}, "state_dict_ema", "state_dict"),
        ({"student": under("module.backbone."), "teacher": under("backbone.")}, "teacher", "student"),
        ({"encoder": under("module."), "target_encoder": under("module.")}, "target_encoder", "encoder"),
        ({"net": under("m.base_encoder.") | under("m.momentum_encoder.")}, "base_encoder", "momentum_encoder"),
        (under("net.") | under("ema_model.net."), "ema_model", "net"),
        ({"models": {"student_s": STATE, "Teacher_s": STATE}}, "Teacher_s", "student_s"),
        ({"state_dict": under("model.") | under("average_model."), "epoch": 1}, "average_model", "model"),
        ({"net": STATE, "net_ema2": STATE}, "net_ema2", "net"),
        ({"online_network": STATE, "momentum_network": STATE}, "momentum_network", "online_network"),
    ],
)
def test_one_of_several_sets_of_weights(tmp_path: Path, content: Any, usual: str, other: str) -> None:
    checkpoint = read(tmp_path, content)
    same(checkpoint)
    note = rf"it has 2 sets of weights: .*; {usual} is taken, take={other} \(--take {other}\) takes another"
    assert re.fullmatch(note, checkpoint.notes[0])
    same(read(tmp_path, content, take=other))
    with pytest.raises(ConfigError, match=r"take='nobody': names none of the sets of weights in .*tensors"):
        read(tmp_path, content, take="nobody")


def test_sets_of_which_none_is_preferred_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has 2 sets .*: left \(\d+ tensors\), right .*--take NAME of a verb, model.init_"
    ):
        read(tmp_path, {"left": STATE, "right": STATE})


def changed(change: Any) -> dict[str, Tensor]:
    return {name: change(value) if value.ndim == 2 else value for name, value in STATE.items()}


@pytest.mark.filterwarnings("ignore:.*(quantize|TypedStorage|Sparse)")
@pytest.mark.parametrize(
    "change",
    [Tensor.to_sparse, Tensor.to_sparse_csr, lambda value: torch.quantize_per_tensor(value, 1e-3, 0, torch.qint32)],
    ids=["coo", "csr", "quantized"],
)
def test_sparse_and_quantized_tensors_become_plain_ones(tmp_path: Path, change: Any) -> None:
    torch.save({"model": changed(change)}, tmp_path / "weights.pth")
    with warnings.catch_warnings(action="error"):
        checkpoint = read_checkpoint(tmp_path / "weights.pth")
    for name, value in checkpoint.tensors.items():
        assert value.layout is torch.strided
        assert torch.allclose(value, STATE[name], atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*nested")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda value: value.to("meta"), "on meta"),
        (lambda value: (value * 127).to(torch.int8), "torch.int8"),
        (lambda value: torch.nested.nested_tensor(list(value)), "nested"),
        (lambda value: value.to(torch.complex64), "torch.complex64"),
    ],
)
def test_tensors_without_numbers_are_named(tmp_path: Path, change: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"floating point: blocks.0.attn.qkv.weight \(.*{reason}\).*; load the"):
        read(tmp_path, {"model": changed(change)})


class Settings(dict):  # type: ignore[type-arg]
    """As easydict and Lightning's AttributeDict: a mapping with attributes."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__ = self


class Names(list):  # type: ignore[type-arg]
    """As omegaconf's and yacs's lists."""


class Options:
    def __init__(self) -> None:
        self.lr, self.nested = 0.1, Settings(a=1)


@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_and_unknown_classes_beside_the_tensors(tmp_path: Path, zipped: bool) -> None:
    counts: dict[str, list[int]] = collections.defaultdict(list)
    counts["a"].append(1)
    beside = {
        "numbers": [np.float32(1), np.int64(2), np.bool_(True), np.str_("x"), np.arange(3), np.complex128(1j)],
        "arrays": [np.array([{}, None]), np.zeros(2, "f4,O"), np.array(["a"]), np.array([1, 2], "M8[s]")],
        "types": [np.dtype("c16"), np.dtype("O"), np.dtype(">f4")],
        "args": argparse.Namespace(output_dir=pathlib.Path("/x"), data=pathlib.PureWindowsPath("c:/x")),
        "config": Settings(model=Settings(width=3)),
        "options": Options(),
        "names": Names(["a", Names(["b"])]),
        "space": types.SimpleNamespace(a=1),
        "open": open,
        "built in": [zip, max, property, range(3), reversed, sorted, ..., NotImplemented, TypeError("x")],
        "sets": ({1, 2}, frozenset([3]), slice(1, 2)),
        "counts": counts,
        "times": [datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.datetime(2026, 1, 1)],
    }
    if zipped:  # torch's older format keeps the code of a module's class, and none of ours reads it
        beside["hyper_parameters"] = {"norm": functools.partial(nn.LayerNorm, eps=1e-6), "act": nn.GELU}
    same(read(tmp_path, {"model": STATE, **beside}, _use_new_zipfile_serialization=zipped))


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize(
    "function", [os.system, subprocess.Popen, subprocess.check_output, eval, compile, getattr, __import__, os.remove]
)
def test_what_could_run_anything_is_refused(tmp_path: Path, function: Any) -> None:
    with pytest.raises(CheckpointError, match="could run anything"):
        read(tmp_path, {"model": STATE, "x": Evil(function, f"touch {tmp_path / 'ran'}")})
    assert not (tmp_path / "ran").exists()


class Touch:
    """A class of this very process: known by name here, and still nothing of it is run."""

    def __init__(self, path: str) -> None:
        Path(path).touch()

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("state was set")


class Reduced:
    """Pickled as whatever is said."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def test_an_array_of_forged_flags_is_not_made(tmp_path: Path) -> None:
    """With them NumPy would take the bytes for the address of an object."""
    fields = {"a": (np.dtype("O"), 0)}
    dtype = Reduced(np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0))
    make, arguments, _ = np.zeros(1).__reduce__()  # type: ignore[misc]
    array = Reduced(make, arguments, (1, (1,), dtype, False, b"\x01" * 8))
    checkpoint = read(tmp_path, {"model": STATE, "x": array})
    same(checkpoint)
    assert checkpoint.content["x"].tensor is None


def test_a_whole_file_that_torch_will_not_read_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"PyTorch's pickle: Can only append to lists.*OrderedDict.*; save model"):
        read(tmp_path, {"model": STATE, "x": Reduced(collections.OrderedDict, (), None, iter([1]))})


@pytest.mark.parametrize("function", [Touch, torch.hub.load_state_dict_from_url, torch.load, torch.save])
def test_what_is_not_known_stays_inert(tmp_path: Path, function: Any) -> None:
    same(read(tmp_path, {"model": STATE, "x": Evil(function, str(tmp_path / "ran"))}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (nn.Linear(2, 2), r"holds a torch.nn.modules.linear.Linear, not.*save model.state_dict"),
        ({"module": {name: torch.zeros(0) for name in STATE}}, "ZeRO-3 .*import-deepspeed"),
        ({"layer1.0.conv1.weight": torch.zeros(2)}, "must hold a Vision Transformer .*layer1.0.conv1.weight"),
        ({"optimizer_state_dict": {"state": {}}}, "an optimizer's state"),
        ([STATE], "holds list"),
        ({"epoch": 1, "nets": {"ema": nn.Sequential(nn.Linear(2, 2))}}, r"Sequential under 'nets.ema', not .*; save "),
    ],
)
def test_what_is_no_checkpoint_of_a_vit(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- dialects
def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@torch.no_grad()
def test_a_linear_probe_gives_the_same_logits(tmp_path: Path) -> None:
    backbone = encoder()
    probe = nn.Sequential(nn.BatchNorm1d(32, affine=False, eps=1e-6), nn.Linear(32, 5)).eval()
    probe[0].running_mean.uniform_(-1, 1)
    probe[0].running_var.uniform_(0.5, 2)
    opened = read_bare(saved(tmp_path, backbone.state_dict() | under("head.", probe.state_dict())), HEADS)
    assert any("linear probe" in note for note in opened.notes)
    x = torch.randn(2, 3, 16, 16)
    close(opened.model(x).logits, probe(backbone.forward_features(x)[:, 0]))


@torch.no_grad()
def test_dinov2_with_registers_chunks_and_packed_swiglu(tmp_path: Path) -> None:
    model = encoder(
        depth=4, init_values=1e-5, reg_tokens=3, no_embed_class=False, mlp_ratio=4, mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=nn.SiLU,
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("reg_token", "register_tokens").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = name.replace(f"blocks.{number}.", f"blocks.{number // 2}.{number}.")
        state[name] = value
    opened = read_bare(saved(tmp_path, state | {"mask_token": torch.zeros(1, 32)}), HEADS)
    assert isinstance(opened.model, ViTModel)
    assert opened.model.config.num_register_tokens == 3
    assert any("mask_token" in note for note in opened.notes)
    x = torch.randn(2, 3, 16, 16)
    close(opened.model(x).last_hidden_state, model.forward_features(x))


@torch.no_grad()
def test_dinov3_with_periods_and_masked_biases(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_small_plus_patch16_dinov3_qkvb",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
    )
    shaken(model)
    state: dict[str, Tensor] = {"rope_embed.periods": 100.0 ** (torch.arange(4) / 4)}
    for name, value in model.state_dict().items():
        name = name.replace("reg_token", "storage_tokens").replace("gamma_", "ls").replace("fc1_g", "w1")
        name = name.replace("fc1_x", "w2").replace("mlp.fc2", "mlp.w3")
        name = name + ".gamma" if name.endswith((".ls1", ".ls2")) else name
        state[name] = value
    for name in [name for name in state if name.endswith("q_bias")]:
        stem, ones = name.removesuffix("q_bias"), torch.ones(32)
        state[f"{stem}qkv.bias"] = torch.cat([state.pop(name), 7 * ones, state.pop(f"{stem}v_bias")])
        state[f"{stem}qkv.bias_mask"] = torch.cat([ones, torch.nan * ones, ones])
    opened = read_bare(saved(tmp_path, state), {"image_size": 32})
    assert (opened.model.config.rope_theta, opened.model.config.num_attention_heads) == (100.0, 2)
    x = torch.randn(2, 3, 32, 32)
    close(opened.model(x).last_hidden_state, model.forward_features(x))


def ours(model_class: Any = ViTForImageClassification, **keys: Any) -> Any:
    model = model_class(ViTConfig(**TINY | {"encoder_stride": 4, "num_labels": 5} | keys))
    initialize(model, 0)
    return shaken(model)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_transformers_state_without_its_config(tmp_path: Path, suffix: str) -> None:
    model = ours()
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").unlink()
    path = tmp_path / "folder" / "model.safetensors"
    if suffix == ".bin":
        from safetensors.torch import load_file

        torch.save({"state_dict": under("model.", load_file(path))}, tmp_path / "w.bin")
        path = tmp_path / "w.bin"
    heads = model.config.num_attention_heads
    again = ViTForImageClassification.from_pretrained(path, num_attention_heads=heads, layer_norm_eps=1e-12)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_simmims_own_file(tmp_path: Path) -> None:
    model = ours(ViTForMaskedImageModeling)
    state = encoder().state_dict() | {"mask_token": torch.ones(1, 1, 32)}
    decoder = {"decoder.0.weight": torch.randn(48, 32, 1, 1), "decoder.0.bias": torch.randn(48)}
    opened = open_model(saved(tmp_path, under("module.encoder.", state) | under("module.", decoder)), HEADS)
    assert isinstance(opened.model, type(model))
    assert torch.equal(opened.model.vit.embeddings.mask_token, state["mask_token"])
    assert torch.equal(opened.model.decoder[0].weight, decoder["decoder.0.weight"])


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({"dist_token": torch.zeros(1, 1, 32)}, "of DeiT's distillation token, which no ViTConfig has: take another"),
        ({"blocks.0.attn.relative_position_bias_table": torch.zeros(9, 4)}, "of relative positions, .*: take another"),
        ({"norm_pre.weight": torch.zeros(32)}, "of CLIP's norm before the blocks, which no"),
        ({"blocks.0.adapter.weight": torch.zeros(2, 32)}, "save the state without them"),
        ({"norm.weight": torch.zeros(3)}, "give the sizes that they have"),
        ({"blocks.1.norm1.bias": None}, "name a file with the whole model"),
    ],
)
def test_tensors_that_do_not_fit_say_what_to_do(tmp_path: Path, more: dict[str, Any], remedy: str) -> None:
    state = {name: value for name, value in (STATE | more).items() if value is not None}
    with pytest.raises(CheckpointError, match=f"(; |are ){remedy}"):
        read_bare(saved(tmp_path, state), HEADS)


def test_from_pretrained_and_init_from_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, {"student": under("backbone."), "teacher": under("module.backbone.")})  # type: ignore[arg-type]
    model, report = ViTForImageClassification.from_pretrained(
        path, num_attention_heads=4, num_labels=3, take="student", output_loading_info=True
    )
    assert sorted(report.fresh) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(model.vit.embeddings.cls_token, STATE["cls_token"])
    assert "student" in capsys.readouterr().err
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16, patch_size=4
    )
    run = ViTForImageClassification(config)
    initialize(run, 0)
    assert sorted(start_from(run, path).fresh) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(run.vit.embeddings.cls_token, STATE["cls_token"])
    torch.save({"left": STATE, "right": changed(torch.neg)}, path)
    start_from(run, path, take="right")
    assert torch.equal(run.vit.encoder.layers[0].mlp.fc1.weight, -STATE["blocks.0.mlp.fc1.weight"])
    save_file(under("net."), tmp_path / "alone.safetensors")
    larger = ViTModel.from_pretrained(tmp_path / "alone.safetensors", num_attention_heads=4, image_size=32)
    assert larger.config.grid == (8, 8)
    assert "'net.'" in capsys.readouterr().err
    larger_run = ViTForImageClassification(config.overridden({"image_size": (32, 16)}))
    initialize(larger_run, 0)
    report = start_from(larger_run, path, adapt=True, take="right")
    assert report.adapted == ["vit.embeddings.position_embeddings 4x4 to 8x4 patches"]
    assert larger_run.config.grid == (8, 4)
