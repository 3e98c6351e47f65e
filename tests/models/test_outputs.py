"""What a model returns: by name, by place, and through what accelerate, DeepSpeed and pickle do to it."""

from __future__ import annotations

import pickle

import pytest
import torch
import transformers

from tests.models.shapes import TRAINABLE, inputs, tiny
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.outputs import MaskedImageModelingOutput
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel, ViTPreTrainedModel


def test_output_is_a_dict_with_attributes() -> None:
    model = tiny(ViTForMaskedImageModeling)
    output = model(**inputs(model))
    assert output.loss is output["loss"]
    assert isinstance(output, dict)
    assert output.attentions is None
    assert "attentions" not in output
    with pytest.raises(AttributeError, match="logit"):
        _ = output.logit
    with pytest.raises(KeyError, match="logit"):
        _ = output["logit"]
    rebuilt = type(output)(dict(output))  # as accelerate does
    assert rebuilt.loss is output.loss
    detached = type(output)(reconstruction=output.reconstruction.detach(), metrics={})
    assert torch.equal(pickle.loads(pickle.dumps(detached)).reconstruction, detached.reconstruction)


def test_fields_by_place() -> None:
    output = MaskedImageModelingOutput(
        loss=torch.tensor(1.0), reconstruction=torch.tensor(2.0), bool_masked_pos=torch.tensor(True), metrics={}
    )
    assert output[0] is output.loss
    assert output[1:] == (output.reconstruction,)
    assert output[-1] is output.reconstruction
    loss, reconstruction = output.to_tuple()  # what is ours alone is left out
    assert (loss, reconstruction) == (output.loss, output.reconstruction)
    with pytest.raises(IndexError):
        _ = output[2]


@pytest.mark.parametrize("model_class", [*TRAINABLE[:3], ViTModel], ids=lambda c: c.__name__)
def test_tuples_are_those_of_transformers(model_class: type[ViTPreTrainedModel]) -> None:
    """The same fields at the same places, with and without a loss."""
    ours = tiny(model_class).eval()
    kind = "ViTMAEConfig" if ours.config.model_type == "vit_mae" else "ViTConfig"
    keys = {name: value for name, value in ours.config.to_dict().items() if name != "model_type"}
    theirs = getattr(transformers, model_class.__name__)(getattr(transformers, kind)(**keys)).eval()
    batch = inputs(ours)
    given = [{"pixel_values": batch["pixel_values"]}]
    if model_class is ViTForImageClassification:
        given.append(given[0] | {"labels": batch["labels"]})
    if model_class is ViTForMaskedImageModeling:
        given.append(given[0] | {"bool_masked_pos": torch.arange(16).expand(6, -1) % 2 == 0})
    for arguments in given:
        found = ours(**arguments, output_hidden_states=True, return_dict=False)
        expected = theirs(**arguments, output_hidden_states=True, return_dict=False)
        assert isinstance(found, tuple)
        assert [_shape(item) for item in found] == [_shape(item) for item in expected]
        assert _shape(ours(**arguments, return_dict=True)[0]) == _shape(expected[0])


def _shape(item: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
    return [tuple(part.shape) for part in item] if isinstance(item, tuple) else tuple(item.shape)


def test_features_carry_every_token() -> None:
    model = tiny(ViTForImageClassification, num_labels=0, num_register_tokens=2).eval()
    output = model(torch.randn(6, 3, 16, 16))
    assert output.last_hidden_state.shape == (6, 3 + 16, 16)
    assert torch.equal(output.logits, output.last_hidden_state[:, 0])
    assert len(output.to_tuple()) == 1  # in the tuple stands what transformers has
    assert tiny(ViTForImageClassification)(torch.randn(6, 3, 16, 16)).last_hidden_state is None


@pytest.mark.parametrize("model_class", [*TRAINABLE, ViTModel], ids=lambda c: c.__name__)
def test_what_a_call_gives_can_stand_in_the_config(model_class: type[ViTPreTrainedModel]) -> None:
    model = tiny(model_class, output_attentions=True).eval()
    batch = inputs(model)
    output = model(**batch)
    assert len(output.attentions) == 3
    assert output.hidden_states is None
    model.config.output_attentions, model.config.output_hidden_states = False, True
    output = model(**batch)
    assert len(output.hidden_states) == 4
    assert output.attentions is None
