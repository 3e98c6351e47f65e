"""The models that are compared are of the same sizes."""

from __future__ import annotations

import pytest
import torch

from vitscale.bench.peers import OURS, TimmMAE, builders, run_config
from vitscale.config.schema import MAE, Model, Objective, RunConfig
from vitscale.interop.vision_transformer import by_timm_names
from vitscale.models.auto import build_model, new_model, vit_config


@pytest.mark.parametrize(("size", "objective", "libraries"), [
    ("Ti", "classification", {"timm", "transformers"}),
    ("H", "classification", {"timm", "transformers"}),  # patches of 14
    ("g", "classification", {"timm", "transformers"}),  # an MLP of 48/11 the width
    ("high", "classification", {"timm", "transformers"}),  # 384 pixels
    ("B", "mae", {"timm", "transformers"}),
])  # fmt: skip
def test_all_have_the_same_number_of_parameters(size: str, objective: str, libraries: set[str]) -> None:
    run = run_config(size, objective)
    with torch.device("meta"):
        ours = build_model(run)
        peers = {name: build() for name, build in builders(run).items() if name != OURS}
    assert set(peers) == libraries
    for model in peers.values():
        counts = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (ours, model)]
        assert counts[0] == counts[1] > 5_000_000


@torch.no_grad()
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_with_equal_weights_and_mask_timms_mae_has_our_loss(norm_pix_loss: bool) -> None:
    decoder = MAE(decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
                  decoder_intermediate_size=36, norm_pix_loss=norm_pix_loss)  # fmt: skip
    sizes = Model(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=(32, 48),
                  patch_size=8)  # fmt: skip
    run = RunConfig(model=sizes, objective=Objective(name="mae", mae=decoder))
    ours, theirs = new_model(run, seed=0), TimmMAE(vit_config(run))
    tensors, left_out = by_timm_names(ours, with_decoder=True)
    assert not left_out
    report = theirs.load_state_dict(tensors, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= {"pos_embed", "decoder_pos_embed"}, "of which both have the same table"
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(3, 3, 32, 48, generator=generator), torch.rand(3, 24, generator=generator)
    (loss, predicted), output = theirs(images, noise), ours(images, noise=noise)
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert torch.allclose(predicted, output.logits, atol=1e-5)
