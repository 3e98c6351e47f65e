"""The encoder's own promises; equality with transformers is in tests/interop."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.models.shapes import TINY, TRAINABLE, inputs, tiny
from vitscale import rng
from vitscale.errors import ConfigError, DataError
from vitscale.models.configuration import ViTConfig
from vitscale.models.mae import ViTMAEConfig, ViTMAEForPreTraining
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTLayer, ViTModel, ViTPreTrainedModel, drop_path_scales

every_trainable = pytest.mark.parametrize("model_class", TRAINABLE, ids=lambda c: c.__name__)


def gradients(model: ViTPreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@every_trainable
def test_every_parameter_gets_a_gradient(model_class: type[ViTPreTrainedModel]) -> None:
    """So that DDP needs no search for unused ones."""
    model = tiny(model_class)
    assert all(torch.isfinite(g).all() for g in gradients(model, inputs(model)).values())


@every_trainable
def test_checkpointing_changes_nothing(model_class: type[ViTPreTrainedModel]) -> None:
    model = tiny(model_class, drop_path_rate=0.3)
    batch = inputs(model)
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    runs = []
    model.vit.encoder.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients(model, batch)
    assert len(runs) == 2  # in forward, and once more in backward
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@every_trainable
def test_training_step_is_a_function_of_the_samples(model_class: type[ViTPreTrainedModel]) -> None:
    """Loss of a batch = mean of its halves' losses, drop path and masks on: no rank matters."""
    model = tiny(model_class, drop_path_rate=0.4).double()
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


def test_eager_attention_agrees_with_the_fused_one() -> None:
    model = tiny(ViTModel).eval()
    batch = inputs(model)
    fused = model(**batch)
    eager = model(**batch, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(fused.last_hidden_state, eager.last_hidden_state, atol=1e-6)
    assert [tuple(a.shape) for a in eager.attentions] == [(6, 2, 17, 17)] * 3
    assert torch.allclose(eager.attentions[0].sum(-1), torch.ones(6, 2, 17))
    assert len(eager.hidden_states) == 4
    assert fused.attentions is None
    assert fused.hidden_states is None


@every_trainable
def test_bf16_keeps_losses_in_float32(model_class: type[ViTPreTrainedModel]) -> None:
    model = tiny(model_class, drop_path_rate=0.2)
    batch = inputs(model)
    exact = model(**batch).loss
    seen = []
    model.vit.encoder.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):  # as under DDP
        autocast = model(**batch).loss
    cast = copy.deepcopy(model).to(torch.bfloat16)  # as under DeepSpeed, the pixels still exact
    low = cast(**batch).loss
    assert (exact.dtype, autocast.dtype, low.dtype) == (torch.float32,) * 3
    assert seen == [torch.bfloat16] * 2  # no float32 parameter or table promotes the activations
    assert torch.allclose(autocast, exact, rtol=0.02)
    assert torch.allclose(low, exact, rtol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_blocks_compile_whole() -> None:
    """No graph break in a block, with drop path on, forward and backward."""
    torch._dynamo.reset()
    model = tiny(ViTForMaskedImageModeling, drop_path_rate=0.5, num_hidden_layers=2)
    batch = inputs(model)
    expected = gradients(model, batch)
    for block in model.blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    found = gradients(model, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_other_image_sizes(positions: str) -> None:
    model = tiny(ViTModel, position_embeddings=positions).eval()
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
    with pytest.raises(TypeError, match="output_attention"):
        model.eval()(torch.randn(2, 3, 16, 16), output_attention=True)


@pytest.mark.parametrize("keys", [
    {"image_size": 30}, {"image_size": (16, 18)}, {"num_attention_heads": 3}, {"hidden_act": "gelo"},
    {"position_embeddings": "rope"}, {"hidden_size": 18, "position_embeddings": "sincos"},
    {"drop_path_rate": 1.0}, {"problem_type": "regression"},
])  # fmt: skip
def test_impossible_configs(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        ViTModel(ViTConfig(**TINY | keys))


def test_config_goes_through_json() -> None:
    config = ViTConfig(**TINY | {"image_size": (16, 32), "num_labels": 7, "drop_path_rate": 0.1})
    assert ViTConfig.from_dict(config.to_dict()) == config
    named = ViTConfig.from_dict({"id2label": {"0": "cat", "1": "dog", "2": "cow"}, "transformers_version": "5.0"})
    assert named.num_labels == 3
    assert named.to_dict()["label2id"] == {"cat": 0, "dog": 1, "cow": 2}
    with pytest.raises(ConfigError, match="use_rope"):
        ViTConfig.from_dict({"use_rope": True})
    with pytest.raises(ConfigError, match="vit_mae"):
        ViTMAEConfig.from_dict(config.to_dict())
    with pytest.raises(ConfigError, match="needs a ViTMAEConfig"):
        ViTMAEForPreTraining(config)


def test_output_is_a_dict_with_attributes() -> None:
    model = tiny(ViTForMaskedImageModeling)
    output = model(**inputs(model))
    assert output.loss is output["loss"]
    assert isinstance(output, dict)
    assert output.attentions is None
    assert "attentions" not in output
    with pytest.raises(AttributeError, match="logit"):
        _ = output.logit
    rebuilt = type(output)(dict(output))  # as accelerate does
    assert rebuilt.loss is output.loss
    detached = type(output)(reconstruction=output.reconstruction.detach(), metrics={})
    assert torch.equal(pickle.loads(pickle.dumps(detached)).reconstruction, detached.reconstruction)


def test_fixed_positions_are_no_state() -> None:
    model = tiny(ViTMAEForPreTraining)
    names = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert names <= dict(model.named_buffers()).keys()
    assert not names & (model.state_dict().keys() | dict(model.named_parameters()).keys())
    learned = tiny(ViTMAEForPreTraining, position_embeddings="learned")
    assert names <= dict(learned.named_parameters()).keys()
