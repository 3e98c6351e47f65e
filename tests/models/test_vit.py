"""The encoder's own promises; equality with transformers is in tests/interop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tests.models.shapes import OPTION_SETS, TINY, TRAINABLE, inputs, tiny, tiny_keys
from vitscale import rng
from vitscale.errors import ConfigError, DataError
from vitscale.models.configuration import ViTConfig
from vitscale.models.mae import ViTMAEForPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTEncoder, ViTLayer, ViTModel, ViTPreTrainedModel, drop_path_scales
from vitscale.planning.live import LiveBytes

every_trainable = pytest.mark.parametrize("model_class", TRAINABLE, ids=lambda c: c.__name__)
every_option = pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())


def gradients(model: ViTPreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@every_option
@every_trainable
def test_every_parameter_gets_a_gradient(model_class: type[ViTPreTrainedModel], options: dict[str, Any]) -> None:
    """So that DDP needs no search for unused ones."""
    model = tiny(model_class, **options)
    assert all(torch.isfinite(g).all() for g in gradients(model, inputs(model)).values())


@every_option
@every_trainable
def test_checkpointing_changes_nothing(model_class: type[ViTPreTrainedModel], options: dict[str, Any]) -> None:
    model = tiny(model_class, drop_path_rate=0.3, **options)
    batch = inputs(model)
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    runs = []
    model.vit.encoder.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients(model, batch)
    assert len(runs) == 2  # in forward, and once more in backward
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@every_option
def test_selective_checkpointing_keeps_the_products(options: dict[str, Any]) -> None:
    """Gradients have the same bits, no product is computed twice, and less is alive between forward and backward."""
    model = tiny(ViTMAEForPreTraining, drop_path_rate=0.3, **options)
    plain, kept, again = (_step(model, how) for how in (None, {"selective": True}, {}))
    assert all(torch.equal(plain.gradients[name], kept.gradients[name]) for name in plain.gradients)
    assert kept.flops == plain.flops < again.flops
    assert again.alive < kept.alive < plain.alive


@dataclass
class Step:
    gradients: dict[str, torch.Tensor]
    flops: int
    alive: int  # bytes when the forward has ended


def _step(model: ViTPreTrainedModel, how: dict[str, Any] | None) -> Step:
    """A step with gradient checkpointing of some kind; None: without."""
    model.gradient_checkpointing_disable()
    if how is not None:
        model.gradient_checkpointing_enable(**how)
    with FlopCounterMode(display=False) as counter, LiveBytes() as live:
        alive: list[int] = []
        model.register_forward_hook(lambda *_: alive.append(live.live))
        found = gradients(model, inputs(model))
    return Step(found, counter.get_total_flops(), alive[-1])


@every_option
@every_trainable
def test_training_step_is_a_function_of_the_samples(
    model_class: type[ViTPreTrainedModel], options: dict[str, Any]
) -> None:
    """Loss of a batch = mean of its halves' losses, drop path and masks on: no rank matters."""
    model = tiny(model_class, drop_path_rate=0.4, **options).double()
    batch = inputs(model)
    torch.manual_seed(1)
    whole = model(**batch).loss
    torch.manual_seed(2)  # of no effect: nothing is drawn from torch's generator
    halves = [model(**{name: x[part] for name, x in batch.items()}).loss for part in (slice(0, 3), slice(3, 6))]
    assert torch.allclose(whole, sum(halves) / 2, rtol=1e-6)


def test_drop_path_is_a_function_of_the_key() -> None:
    keys = rng.sample_key(0, 0, torch.arange(4000))
    scales = drop_path_scales(keys, 0.4, 5)
    assert scales.shape == (5, 4000, 2)
    assert torch.equal(drop_path_scales(keys[[9, 3]], 0.4, 5), scales[:, [9, 3]])
    dropped = (scales == 0).float().mean((1, 2))
    rates = torch.linspace(0, 0.4, 5)
    assert (dropped - rates).abs().max() < 0.02
    kept = [scales[i][scales[i] > 0].unique() for i in range(5)]
    assert torch.allclose(torch.cat(kept), 1 / (1 - rates))
    branches = scales[4].flatten().view(-1, 2) == 0
    assert abs((branches[:, 0] & branches[:, 1]).float().mean().item() - 0.16) < 0.03  # drawn apart


def test_the_branches_of_a_block_are_dropped_apart() -> None:
    layer = tiny(ViTModel, layer_scale_init_value=1.0).encoder.layers[0]
    x = torch.randn(1, 5, 16)
    attention = layer.attention(layer.layernorm_before(x))[0]
    mlp = layer.mlp(layer.layernorm_after(x))
    assert torch.allclose(layer(x, torch.tensor([[2.0, 0.0]])), x + 2 * attention, atol=1e-6)
    assert torch.allclose(layer(x, torch.tensor([[0.0, 3.0]])), x + 3 * mlp, atol=1e-6)


def test_gradient_checkpointing_by_transformers_calls() -> None:
    model = tiny(ViTMAEForPreTraining)
    encoders = [module for module in model.modules() if isinstance(module, ViTEncoder)]
    assert len(encoders) == 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(encoder.gradient_checkpointing for encoder in encoders)
    model.gradient_checkpointing_disable()
    assert not any(encoder.gradient_checkpointing for encoder in encoders)
    with pytest.raises(ConfigError, match="gradient_checkpointing_kwargs"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_images_of_no_whole_patches() -> None:
    model = tiny(ViTModel).eval()
    for size in ((18, 22), (2, 2), (16, 15)):
        with pytest.raises(DataError, match=rf"images of {size[0]}x{size[1]} pixels: must be whole patches of 4x4"):
            model(torch.randn(1, 3, *size), interpolate_pos_encoding=True)


def test_the_base_model() -> None:
    model, encoder = tiny(ViTMAEForPreTraining), tiny(ViTModel)
    assert model.base_model is model.vit
    assert encoder.base_model is encoder


def test_what_transformers_models_say_of_themselves() -> None:
    keys = tiny_keys(ViTModel)
    ours, theirs = tiny(ViTModel).double(), transformers.ViTModel(transformers.ViTConfig(**keys)).double()
    assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype) == (torch.device("cpu"), torch.float64)
    assert ours.get_input_embeddings() is ours.embeddings.patch_embeddings
    ours.embeddings.cls_token.requires_grad_(False)
    theirs.embeddings.cls_token.requires_grad_(False)
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)


def test_dropped_branches_leave_the_sample_as_it_was() -> None:
    layer = ViTLayer(ViTConfig(**TINY))
    x = torch.randn(2, 5, 16)
    y = layer(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(y[0], x[0])
    assert torch.equal(y[1], layer(x)[1])


def test_evaluation_drops_nothing() -> None:
    model = tiny(ViTModel, drop_path_rate=0.9).eval()
    plain = tiny(ViTModel).eval()
    batch = inputs(model)
    assert torch.equal(model(**batch).last_hidden_state, plain(**batch).last_hidden_state)


@pytest.mark.parametrize(("options", "tokens"), [*zip(OPTION_SETS.values(), (17, 19, 19), strict=True)])
def test_eager_attention_agrees_with_the_fused_one(options: dict[str, Any], tokens: int) -> None:
    model = tiny(ViTModel, **options).eval()
    batch = inputs(model)
    fused = model(**batch)
    eager = model(**batch, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(fused.last_hidden_state, eager.last_hidden_state, atol=1e-6)
    assert [tuple(a.shape) for a in eager.attentions] == [(6, 2, tokens, tokens)] * 3
    assert torch.allclose(eager.attentions[0].sum(-1), torch.ones(6, 2, tokens))
    assert eager.last_hidden_state.shape == (6, tokens, 16)
    assert len(eager.hidden_states) == 4
    assert fused.attentions is None
    assert fused.hidden_states is None


def block_inputs(model: ViTPreTrainedModel) -> list[torch.dtype]:
    """A list that gets the dtype of what each block is given."""
    seen: list[torch.dtype] = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    return seen


@every_option
@every_trainable
def test_autocast_leaves_the_residual_stream_in_float32(
    model_class: type[ViTPreTrainedModel], options: dict[str, Any]
) -> None:
    """As in MAE's own training: branches are bfloat16, what they are added to is not."""
    model = tiny(model_class, drop_path_rate=0.2, **options)
    seen, branches = block_inputs(model), []
    for block in model.blocks():
        block.mlp.register_forward_hook(lambda *given: branches.append(given[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs(model)).loss.backward()
    assert seen == [torch.float32] * len(model.blocks())
    assert branches == [torch.bfloat16] * len(model.blocks())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_autocast_is_transformers_autocast(tmp_path: Path) -> None:
    """Their hidden states are float32 too, and near ours."""
    theirs = transformers.ViTModel(transformers.ViTConfig(**TINY)).eval()
    theirs.save_pretrained(tmp_path)
    ours = ViTModel.from_pretrained(tmp_path).eval()
    given: dict[str, Any] = {"pixel_values": inputs(ours)["pixel_values"], "output_hidden_states": True}
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = theirs(**given).hidden_states, ours(**given).hidden_states
    assert [x.dtype for x in found] == [torch.float32] * 4
    for x, y in zip(found, expected, strict=True):
        assert y.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


@every_option
@every_trainable
def test_bf16_keeps_losses_in_float32(model_class: type[ViTPreTrainedModel], options: dict[str, Any]) -> None:
    model = tiny(model_class, drop_path_rate=0.2, **options)
    batch = inputs(model)
    exact = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):  # as under DDP
        autocast = model(**batch).loss
    cast = copy.deepcopy(model).to(torch.bfloat16)  # as under DeepSpeed, the pixels still exact
    seen = block_inputs(cast)
    low = cast(**batch).loss
    assert (exact.dtype, autocast.dtype, low.dtype) == (torch.float32,) * 3
    assert set(seen) == {torch.bfloat16}  # no float32 table promotes the activations
    assert torch.allclose(autocast, exact, rtol=0.02)
    assert torch.allclose(low, exact, rtol=0.02)


@pytest.mark.parametrize("positions", [
    {}, {"position_embeddings": "sincos"}, {"position_embeddings": "none", "rope_theta": 100.0},
    {"use_cls_token": False, "pooling": "mean", "num_register_tokens": 1},
])  # fmt: skip
def test_other_image_sizes(positions: dict[str, Any]) -> None:
    model = tiny(ViTModel, **positions).eval()
    for size in ((16, 16), (8, 12), (32, 20)):
        pixels = torch.randn(2, 3, *size)
        tokens = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert tokens.shape == (2, 1 + size[0] * size[1] // 16, 16)
    with pytest.raises(DataError, match=r"32x20.*image_size=16.*interpolate_pos_encoding"):
        model(torch.randn(2, 3, 32, 20))


def test_wrong_input_is_told() -> None:
    model = tiny(ViTModel, drop_path_rate=0.1)
    with pytest.raises(DataError, match=r"\[n, 3, height, width\]"):
        model(torch.randn(2, 1, 16, 16))
    with pytest.raises(DataError, match=r"drop_path_rate=0\.1 needs sample_key"):
        model(torch.randn(2, 3, 16, 16))
    with pytest.raises(DataError, match="mask token"):
        model(torch.randn(2, 3, 16, 16), torch.zeros(2, 16, dtype=torch.bool))
    with pytest.raises(DataError, match=r"bool_masked_pos of shape \(2, 15\): must be \(2, 16\)"):
        tiny(ViTForMaskedImageModeling)(torch.randn(2, 3, 16, 16), torch.zeros(2, 15, dtype=torch.bool))
    with pytest.raises(TypeError, match="output_attention"):
        model.eval()(torch.randn(2, 3, 16, 16), output_attention=True)


def test_fixed_positions_are_no_state() -> None:
    model = tiny(ViTMAEForPreTraining)
    names = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert names <= dict(model.named_buffers()).keys()
    assert not names & (model.state_dict().keys() | dict(model.named_parameters()).keys())
    learned = tiny(ViTMAEForPreTraining, position_embeddings="learned")
    assert names <= dict(learned.named_parameters()).keys()


def test_blocks_by_the_names_that_tutorials_hook() -> None:
    model = tiny(ViTForMaskedImageModeling)
    assert model.vit.encoder.layer[0] is model.vit.encoder.layers[0]
    assert not [name for name, _ in model.named_parameters() if ".layer." in name]
