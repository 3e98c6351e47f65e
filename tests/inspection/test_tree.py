"""The tree counts every parameter once, and FLOPs as torch's counter does on a real forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.models.shapes import TINY, TRAINABLE, inputs, tiny
from vitscale.inspection.tree import Node, as_table, module_tree
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "non-square, 4 channels": {"image_size": (8, 16), "num_channels": 4},
    "registers, layer scale, qk norm": {"num_register_tokens": 3, "layer_scale_init_value": 0.1, "qk_norm": True},
    "no class token, sincos": {"use_cls_token": False, "pooling": "mean", "position_embeddings": "sincos"},
    "narrow heads": {"head_dim": 4},
    "rope, swiglu": {"rope_theta": 100.0, "position_embeddings": "none", "swiglu": True},
}


def node(tree: Node, path: str) -> Node:
    """The node at 'vit/encoder/layers.0-2'."""
    for name in path.split("/"):
        tree = next(child for child in tree.children if child.name == name)
    return tree


def fused_on_the_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """What torch's counter does for the fused attention of a GPU, which it leaves out on a CPU."""
    return sdpa_flop_count(query, key, value)  # shapes


COUNTED_TOO = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_on_the_cpu}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model_class", [ViTModel, *TRAINABLE], ids=lambda c: c.__name__)
def test_counts_are_those_of_a_real_forward(model_class: type[ViTPreTrainedModel], options: str) -> None:
    if model_class is ViTMAEForPreTraining and "head_dim" in OPTIONS[options]:
        pytest.skip("refused by its config")
    model = tiny(model_class, **OPTIONS[options]).eval()
    tree = module_tree(model)
    assert tree.total == sum(parameter.numel() for parameter in model.parameters())
    pixels = inputs(model, 1)["pixel_values"]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as counter:
        model(pixels)
    assert tree.flops == counter.get_total_flops()
    pooler = node(tree, "pooler").flops if model_class is ViTModel else 0  # models/flops.py leaves it out
    assert model.forward_flops() == tree.flops - pooler


def test_alike_blocks_are_one_line_and_others_are_not() -> None:
    model = tiny(ViTForImageClassification, num_hidden_layers=5)
    block = node(module_tree(model), "vit/encoder/layers.0-4")
    assert (block.copies, block.kind) == (5, "ViTLayer")
    assert block.total == sum(parameter.numel() for parameter in model.vit.encoder.layers[0].parameters())
    model.vit.encoder.layers[2].mlp.fc1 = nn.Linear(16, 20)
    model.vit.encoder.layers[2].mlp.fc2 = nn.Linear(20, 16)
    names = [child.name for child in node(module_tree(model), "vit/encoder").children]
    assert names == ["layers.0-1", "layers.2", "layers.3-4"]


def test_shapes_are_of_one_image() -> None:
    tree = module_tree(tiny(ViTForImageClassification))
    qkv = node(tree, "vit/encoder/layers.0-2/attention/attention/qkv")
    assert qkv.parameters == {"weight": (48, 16), "bias": (48,)}
    assert node(tree, "vit/encoder/layers.0-2").output == (17, 16)
    assert node(tree, "vit/embeddings/patch_embeddings/projection").output == (16, 4, 4)
    assert tree.output == (5,)
    fixed = node(module_tree(tiny(ViTMAEForPreTraining)), "vit/embeddings")
    assert fixed.tables == {"position_embeddings": (1, 17, 16)}
    assert fixed.own == 16  # the class token


def test_table_has_a_line_a_node_down_to_the_depth() -> None:
    tree = module_tree(tiny(ViTForImageClassification))
    lines = as_table(tree, 1).splitlines()
    assert [line.split()[0] for line in lines] == ["module", "(model)", "vit", "classifier"]
    whole = as_table(tree)
    assert "layers.0-2 (each of 3)" in whole
    assert "weight 48x16, bias 48" in whole
    total = sum(torch.Size(shape).numel() for shape in ((5, 16), (5,)))
    assert lines[-1].split()[2:5] == ["5", f"{total}", f"{total}"]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny(ViTForImageClassification, **TINY).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module_tree(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])
