"""What is served of each kind of model, and its graph for any number and size of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.export.small import OPTIONS, noise, small
from vitscale.export.served import Served, trace
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel


@pytest.mark.parametrize(
    ("model_class", "names", "labels"),
    [
        (ViTForImageClassification, ("logits",), 5),
        (ViTForMultitaskPreTraining, ("logits",), 2),
        (ViTModel, ("last_hidden_state", "pooler_output"), 0),
        (ViTForMaskedImageModeling, ("last_hidden_state",), 0),
        (ViTMAEForPreTraining, ("last_hidden_state",), 0),
    ],
)
def test_outputs_of_each_kind(model_class: Any, names: tuple[str, ...], labels: int) -> None:
    keys = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2} if model_class is ViTMAEForPreTraining else {}
    model = small(model_class, **keys)
    served = Served(model.train())
    assert (served.output_names, served.num_labels) == (names, labels)
    images = noise(2, model)
    with torch.no_grad():
        outputs = served(images)
        again = (model if names[0] == "logits" else getattr(model, "vit", model))(images)
    assert len(outputs) == len(names)
    for name, output in zip(names, outputs, strict=True):
        torch.testing.assert_close(output, again[name], rtol=0, atol=0)
    if model_class is ViTMAEForPreTraining:
        assert outputs[0].shape == (2, 1 + model.config.num_patches, 32), "every patch is visible"


def test_a_model_without_a_classifier_gives_features() -> None:
    served = Served(small(num_labels=0))
    assert (served.output_names, served.num_labels) == (("logits",), 0)
    assert served(noise(2, small()))[0].shape == (2, 32)


@pytest.mark.parametrize("dynamic_size", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_graph_for_any_number_of_images(options: dict[str, Any], dynamic_size: bool) -> None:
    model = small(**options)
    served = Served(model, dynamic_size)
    graph = trace(served).module()
    size = tuple(served.random_images(1).shape[2:])
    sizes = [(1, size), (5, size)]
    if dynamic_size:
        sizes += [(1, (16, 16)), (3, (size[0] + 16, size[1] - 8)), (2, (16, 64))]
    for n, shape in sizes:
        images = noise(n, model, shape)
        with torch.no_grad():
            expected = model(images, interpolate_pos_encoding=dynamic_size).logits
            torch.testing.assert_close(graph(images)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("image_size", "more", "size"), [
    (32, (-1, 0), (24, 32)), (16, (-1, -5), (16, 16)), (8, (0, 0), (8, 8)), (8, (1, 2), (16, 24)),
])  # fmt: skip
def test_random_images_are_of_sizes_that_it_takes(
    image_size: int, more: tuple[int, int], size: tuple[int, int]
) -> None:
    """Its own, whatever it is, or LEAST_PATCHES a side and more."""
    served = Served(small(image_size=image_size), dynamic_size=True)
    assert served.random_images(2, more).shape == (2, 3, *size)


def test_a_fixed_size_is_held_to() -> None:
    model = small()
    with pytest.raises(AssertionError, match="pixel_values"):
        trace(Served(model)).module()(noise(2, model, (40, 32)))


def test_what_would_fix_the_number_of_images_is_an_error() -> None:
    class Fixing(Served):
        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (pixel_values.sum() * torch.ones(len(pixel_values)),)

    with pytest.raises(Exception, match="batch"):
        trace(Fixing(small()))


def test_no_path_of_this_machine_is_in_the_graph() -> None:
    program = trace(Served(small()))
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
