"""torch.compile of a whole model: one graph, and the outputs that it had before."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.shapes import EVERY_OPTION, TRAINABLE, inputs, tiny
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.multitask import ViTForMultitaskPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NEEDS_CPP = pytest.mark.skipif(shutil.which("c++") is None, reason="torch's compiler needs c++ on a CPU")
every_model = pytest.mark.parametrize("model_class", [*TRAINABLE, ViTModel], ids=lambda c: c.__name__)
every_option = pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "options"])


def reset() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


def graphs() -> tuple[int, int]:
    """How many graphs were made since the test began, and how many breaks there were."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def gradients(model: nn.Module, batch: dict[str, Tensor], forward: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = forward(**batch)
    loss = output.last_hidden_state.square().sum() + output.pooler_output.sum() if "loss" not in output else output.loss
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@every_option
@every_model
def test_training_is_one_graph(model_class: type[ViTPreTrainedModel], options: dict[str, Any]) -> None:
    """Masks, drop path, losses and metrics with it; drop path and masks are the same ones."""
    model = tiny(model_class, drop_path_rate=0.5, num_hidden_layers=2, **options)
    batch = inputs(model, n=4)
    expected = gradients(model, batch, model)
    found = gradients(model, batch, torch.compile(model, backend="eager", fullgraph=True))
    assert graphs() == (1, 0)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


@every_option
@every_model
def test_inference_is_one_graph(model_class: type[ViTPreTrainedModel], options: dict[str, Any]) -> None:
    model = tiny(model_class, num_hidden_layers=1, **options).eval()
    batch = inputs(model, n=4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected, found = model(**batch, **asked), compiled(**batch, **asked)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"metrics"}:
        before, after = ((value,) if isinstance(value, Tensor) else value for value in (expected[name], found[name]))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
    assert graphs() == (1, 0)


def test_explain_counts_no_break() -> None:
    model = tiny(ViTMAEForPreTraining, drop_path_rate=0.5, num_hidden_layers=1)
    explained = torch._dynamo.explain(model)(**inputs(model, n=2))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@NEEDS_CPP
@every_option
def test_compiled_code_gives_the_same(options: dict[str, Any]) -> None:
    """The default backend, as a user compiles; the others of this file do not make code."""
    model = tiny(ViTForImageClassification, num_hidden_layers=2, **options)
    batch = inputs(model, n=4)
    expected, logits = gradients(model, batch, model), model(**batch).logits
    compiled = torch.compile(model, fullgraph=True)
    found = gradients(model, batch, compiled)
    assert graphs() == (1, 0)
    assert all(torch.allclose(expected[name], found[name], atol=1e-5) for name in expected)
    assert torch.allclose(compiled(**batch).logits, logits, atol=1e-5)


def test_any_batch_size_is_one_more_graph() -> None:
    """The first other size makes a graph for all of them."""
    model = tiny(ViTForMaskedImageModeling, drop_path_rate=0.5, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = inputs(model)
    for n in (6, 5, 4, 3):
        some = {name: value[:n] for name, value in batch.items()}
        assert torch.equal(compiled(**some).loss, model(**some).loss)
    assert graphs() == (2, 0)


def test_other_image_sizes_compile() -> None:
    model = tiny(ViTForImageClassification, num_hidden_layers=1, rope_theta=100.0).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((16, 16), (24, 12), (8, 20)):
        pixels = torch.randn(2, 3, *size)
        found = compiled(pixels, interpolate_pos_encoding=True).logits
        assert torch.allclose(found, model(pixels, interpolate_pos_encoding=True).logits, atol=1e-6)
    assert graphs()[1] == 0


def test_backward_and_checkpointing_compile() -> None:
    """Traced too where the backend takes both (aot_eager, as inductor does)."""
    model = tiny(ViTMAEForPreTraining, drop_path_rate=0.5, num_hidden_layers=2)
    batch = inputs(model, n=4)
    expected = gradients(model, batch, model)
    found = gradients(model, batch, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)
    reset()
    model.gradient_checkpointing_enable()
    found = gradients(model, batch, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert graphs() == (1, 0)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


def test_a_loss_of_ones_own_compiles() -> None:
    model = tiny(ViTForImageClassification, num_hidden_layers=1)
    batch = inputs(model, n=4)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.log_softmax(-1) * (labels[:, None] + 1)).mean()

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**batch, loss=loss).loss, model(**batch, loss=loss).loss)
    assert graphs() == (1, 0)


@pytest.mark.parametrize(("options", "selective"), [
    ({}, False), (EVERY_OPTION, False), (EVERY_OPTION, True)
], ids=["plain", "options", "selective"])  # fmt: skip
def test_blocks_compile_whole(options: dict[str, Any], selective: bool) -> None:
    """As a run does with train.compile: every block for itself, forward and backward."""
    model = tiny(ViTForMaskedImageModeling, drop_path_rate=0.5, num_hidden_layers=2, **options)
    batch = inputs(model)
    expected = gradients(model, batch, model)
    if selective:
        model.gradient_checkpointing_enable(selective=True)
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    found = gradients(model, batch, model)
    assert graphs()[0] > 0
    assert graphs()[1] == 0
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize(("model_class", "options"), [
    (ViTMAEForPreTraining, {"norm_pix_loss": True}), (ViTMAEForPreTraining, {"norm_pix_loss": False}),
    (ViTForMaskedImageModeling, {"patch_size": (2, 4), "encoder_stride": (2, 4)}), (ViTForMultitaskPreTraining, {}),
], ids=["mae", "mae-plain", "simmim", "multitask"])  # fmt: skip
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.full, NEEDS_CPP])])
def test_losses_over_pixels_compile_whole(
    model_class: type[ViTPreTrainedModel], options: dict[str, Any], precision: torch.dtype, backend: str
) -> None:
    """Patches, their normalization and the mean are one graph forward and one backward, of what the model gives them;
    in float32 under autocast too, and of another batch in evaluation."""
    model = tiny(model_class, num_hidden_layers=1, **options)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32)
    eager, given = model.pixel_loss, []
    model.pixel_loss = lambda *arguments: given.append(arguments) or eager(*arguments)
    with autocast, torch.no_grad():
        model(**inputs(model))
    model.pixel_loss = eager
    model.compile_blocks(backend=backend, fullgraph=True)
    results = []
    (pixels, predicted, mask, *sizes), n = given[0], 4
    for loss in (eager, model.pixel_loss):
        leaf = predicted.clone().requires_grad_()
        with autocast:
            value = loss(pixels, leaf, mask, *sizes)
        value.backward()
        with autocast, torch.no_grad():
            results.append([value.detach(), leaf.grad, loss(pixels[:n], predicted[:n], mask[:n], *sizes)])
    assert predicted.dtype == precision
    assert [result.dtype for result in results[1]] == [torch.float32, precision, torch.float32]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-8)
    assert graphs() == (2, 0)


def test_blocks_compiled_under_autocast_keep_the_residual_stream_in_float32() -> None:
    """Traced with what they are given in training, they give float32 on: nothing is rounded between blocks."""
    model = tiny(ViTMAEForPreTraining, num_hidden_layers=2, drop_path_rate=0.5)
    batch, dtypes = inputs(model), []
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
        for block in model.blocks():
            block.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
            block.register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
        model.compile_blocks(backend="aot_eager", fullgraph=True)
        loss = model(**batch).loss
    loss.backward()
    assert graphs()[0] > 0
    assert dtypes == [torch.float32] * 2 * len(model.blocks())
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
