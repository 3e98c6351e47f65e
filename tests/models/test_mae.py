"""MAE against the paper's words, computed the long way."""

from __future__ import annotations

import pytest
import torch

from tests.models.shapes import inputs, tiny
from vitscale.errors import ConfigError, DataError
from vitscale.models.mae import ViTMAEForPreTraining


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_mean_over_hidden_patches(norm_pix_loss: bool) -> None:
    model = tiny(ViTMAEForPreTraining, norm_pix_loss=norm_pix_loss, patch_size=(4, 2), num_channels=2)
    batch = inputs(model, n=3)
    output = model(**batch)
    errors = []
    for image, prediction, mask in zip(batch["pixel_values"], output.logits, output.mask, strict=True):
        for patch in range(32):
            row, column = divmod(patch, 8)
            pixels = image[:, row * 4 : row * 4 + 4, column * 2 : column * 2 + 2]
            target = pixels.permute(1, 2, 0).flatten()  # pixel by pixel, channels last
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6) ** 0.5
            if mask[patch]:
                errors.append(((prediction[patch] - target) ** 2).mean())
    assert len(errors) == 3 * (32 - 8)
    assert torch.allclose(output.loss, torch.stack(errors).mean(), rtol=1e-5)


def test_encoder_sees_only_visible_patches() -> None:
    model = tiny(ViTMAEForPreTraining)
    batch = inputs(model)
    lengths = []
    model.vit.encoder.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    output = model(**batch)
    assert lengths == [1 + 4]
    hidden = model.unpatchify(output.mask[..., None].expand(-1, -1, 48))
    changed = batch | {"pixel_values": batch["pixel_values"] + hidden * torch.randn_like(hidden)}
    assert torch.equal(model(**changed).logits, output.logits)


def test_mask_is_the_samples_own() -> None:
    model = tiny(ViTMAEForPreTraining)
    batch = inputs(model)
    mask = model(**batch).mask
    some = {name: values[[4, 1]] for name, values in batch.items()}
    assert torch.equal(model(**some).mask, mask[[4, 1]])


def test_noise_decides_where_it_is_given() -> None:
    model = tiny(ViTMAEForPreTraining)
    batch = inputs(model)
    noise = torch.arange(16.0).flip(0).expand(6, -1)
    assert model(**batch, noise=noise).mask[0].tolist() == [1.0] * 12 + [0.0] * 4


def test_randomness_must_be_given_in_training_only() -> None:
    model = tiny(ViTMAEForPreTraining)
    pixels = inputs(model)["pixel_values"]
    with pytest.raises(DataError, match="sample_key"):
        model(pixels)
    assert model.eval()(pixels).mask.sum() == 6 * 12


def test_patchify_there_and_back() -> None:
    model = tiny(ViTMAEForPreTraining, image_size=(8, 16), patch_size=(4, 2), num_channels=5)
    images = torch.randn(2, 5, 8, 16)
    assert torch.equal(model.unpatchify(model.patchify(images)), images)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_keeps_what_was_visible(norm_pix_loss: bool) -> None:
    model = tiny(ViTMAEForPreTraining, norm_pix_loss=norm_pix_loss)
    batch = inputs(model)
    output = model(**batch)
    images = model.reconstruct(batch["pixel_values"], output)
    visible = model.patchify(images) == model.patchify(batch["pixel_values"])
    assert torch.equal(visible.all(-1), output.mask == 0)
    # A perfect prediction gives the image back.
    target = model.patchify(batch["pixel_values"])
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    output["logits"] = target
    assert torch.allclose(model.reconstruct(batch["pixel_values"], output), batch["pixel_values"], atol=1e-5)


@pytest.mark.parametrize("keys", [
    {"decoder_hidden_size": 10, "decoder_num_attention_heads": 4}, {"decoder_hidden_size": 6},
    {"norm_pix_loss": True, "patch_size": 1, "num_channels": 1},
])  # fmt: skip
def test_impossible_decoders(keys: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"decoder_hidden_size|norm_pix_loss"):
        tiny(ViTMAEForPreTraining, **keys)
