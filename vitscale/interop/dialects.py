"""Names and forms in which others keep a ViT's tensors, as those of timm's VisionTransformer.

DINO, DINOv2, DINOv3, SimMIM, MAE and timm's Eva share most of its names; here is what differs. What has no partner
keeps its name, so that whoever builds the model names it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from vitscale.interop.checkpoints import HF_ANCHORS
from vitscale.interop.keymaps import PARTS, canonical, ours_from_disk
from vitscale.interop.timm_names import timm_name
from vitscale.text import listed

Tensors = dict[str, Tensor]
_BATCH_NORM_EPS = 1e-6  # of main_linprobe.py's head, which has no weight and bias
_RENAMES = (
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),  # DINOv2's chunks of blocks
    (re.compile(r"^(register_tokens|storage_tokens)$"), "reg_token"),
    (re.compile(r"^masked_embed$"), "mask_token"),  # iBOT's
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),
    (re.compile(r"\.mlp\.w12\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
)
# Two tensors whose rows, one below the other, are one of ours: gate and value of a SwiGLU.
_STACKED = (
    (".fc1_g.", ".fc1_x.", ".fc1."),
    (".mlp.w1.", ".mlp.w2.", ".mlp.fc1."),
    (".mlp.gate_proj.", ".intermediate.dense.", ".intermediate.dense."),
)
_OF_ENCODER = ("embeddings.", "encoder.", "layernorm.", "pooler.")
_REGISTERS, _MASK_TOKEN = "vit.embeddings.register_tokens", "vit.embeddings.mask_token"
# Heads that pretraining leaves behind: of DINO, iBOT, MoCo v3, and what tells them from a classifier.
_PROJECTION_HEAD = re.compile(r"^(head\.(mlp|last_layer|\d+)|\w*(dino|ibot|proj|predictor)\w*)\.")


def plain_names(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The same tensors by timm's names, and what was made of which."""
    if any(name.endswith(HF_ANCHORS) for name in tensors):
        named, left = vit_names(tensors)
        plain = {timm_name(name) or name: tensor for name, tensor in ours_from_disk(named).items()}
        return {"mask_token" if name == _MASK_TOKEN else name: tensor for name, tensor in plain.items()}, left
    plain = {}
    for name, tensor in tensors.items():
        for pattern, new in _RENAMES:
            name = pattern.sub(new, name)
        plain[name] = tensor
    _join_rows(plain)
    _join_biases(plain)
    notes = [*_fold_batch_norm(plain), *_leave_projection_heads(plain)]
    return plain, notes


def vit_names(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Tensors of any plain ViT of transformers, DINOv2 to I-JEPA, by the names of its ViT, the encoder's under `vit.`;
    and what was left out. Of two that would have one name the second keeps its own, marked, to be named as unexpected.
    """
    named: Tensors = {}
    for name, tensor in tensors.items():
        standard = canonical(name)
        standard = f"vit.{standard}" if standard.startswith(_OF_ENCODER) else standard
        named[standard if standard not in named else f"{name} (again)"] = tensor
    if _REGISTERS in named and not named[_REGISTERS].numel():  # DINOv3 without registers
        del named[_REGISTERS]
    if _MASK_TOKEN in named:  # DINOv2's has two dimensions
        named[_MASK_TOKEN] = named[_MASK_TOKEN].reshape(1, 1, -1)
    _join_rows(named)
    biases = [name for name in named if name.endswith(".bias")]
    absent = [part for part in PARTS if not any(part in name for name in biases)]
    for name in biases:  # where no key has a bias, as in DINOv3
        for part, other in itertools.product(PARTS, absent):
            if part in name:
                named.setdefault(name.replace(part, other), torch.zeros_like(named[name]))
    return named, list(_leave_wide_classifier(named))


def rope_theta(tensors: Tensors) -> tuple[float | None, int | None]:
    """Base and head width of DINOv3's rotary positions, from the periods that its files hold; these are taken out.

    None, None if there are none. Periods of another form stay, to be named as unexpected.
    """
    periods = tensors.get("rope_embed.periods")
    if periods is None or periods.ndim != 1 or len(periods) < 2:
        return None, None
    count = len(periods)
    theta = round(float(periods[1].double()) ** count, 2)
    expected = theta ** (torch.arange(count, dtype=torch.float64) / count)
    if not torch.allclose(periods.double(), expected, rtol=1e-2):  # the files have bfloat16
        return None, None
    del tensors["rope_embed.periods"]
    return theta, 4 * count


def _join_rows(tensors: Tensors) -> None:
    for first, second, joined in _STACKED:
        for name in [name for name in tensors if first in name]:
            partner = name.replace(first, second)
            if _alike(tensors[name], tensors.get(partner)):
                tensors[name.replace(first, joined)] = torch.cat([tensors.pop(name), tensors.pop(partner)])


def _join_biases(tensors: Tensors) -> None:
    """Biases of query and value alone (Eva, SimMIM), and such a mask (DINOv3): the keys have none."""
    for name in [name for name in tensors if name.endswith(".q_bias")]:
        stem = name.removesuffix("q_bias")
        if _alike(tensors[name], tensors.get(f"{stem}v_bias")):
            query, value = tensors.pop(name), tensors.pop(f"{stem}v_bias")
            tensors[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    for name in [name for name in tensors if name.endswith(".qkv.bias_mask")]:
        bias = name.removesuffix("_mask")
        if _alike(tensors[name], tensors.get(bias)):
            tensors[bias] = tensors[bias] * tensors.pop(name).nan_to_num(0.0)


def _fold_batch_norm(tensors: Tensors) -> Iterable[str]:
    """main_linprobe.py's classifier, a batch norm and a linear layer, as one linear layer of the same logits."""
    mean, variance, weight = (tensors.get(f"head.{name}") for name in ("0.running_mean", "0.running_var", "1.weight"))
    if mean is None or variance is None or weight is None or weight.ndim != 2:
        return
    bias = tensors.pop("head.1.bias", weight.new_zeros(len(weight)))
    scale = tensors.pop("head.0.weight", torch.ones_like(mean)) / (variance + _BATCH_NORM_EPS).sqrt()
    shift = tensors.pop("head.0.bias", torch.zeros_like(mean)) - mean * scale
    for name in ("head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight"):
        tensors.pop(name, None)
    tensors["head.weight"], tensors["head.bias"] = weight * scale, bias + weight @ shift
    yield "head: a linear probe's batch norm and linear layer became one linear layer of the same logits"


def _leave_wide_classifier(tensors: Tensors) -> Iterable[str]:
    """DINOv2's classifier takes the class token and the mean of the patches together."""
    weight, norm = tensors.get("classifier.weight"), tensors.get("vit.layernorm.weight")
    if weight is not None and norm is not None and weight.shape[1:] == (2 * len(norm),):
        heads = [name for name in tensors if name.startswith("classifier.")]
        for name in heads:
            del tensors[name]
        yield f"not used, a classifier of the class token and the patches' mean together: {listed(heads)}"


def _leave_projection_heads(tensors: Tensors) -> Iterable[str]:
    heads = [name for name in tensors if _PROJECTION_HEAD.match(name)]
    for name in heads:
        del tensors[name]
    if heads:
        yield f"not used, a projection head of pretraining: {listed(heads)}"


def _alike(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and one.dim() > 0
