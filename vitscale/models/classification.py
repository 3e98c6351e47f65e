"""Supervised classification from the class token (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitscale.models import flops
from vitscale.models.configuration import ViTConfig
from vitscale.models.losses import label_metrics
from vitscale.models.outputs import ClassificationOutput
from vitscale.models.vit import ViTModel, ViTPreTrainedModel


class ViTForImageClassification(ViTPreTrainedModel):
    """A linear layer on the class token; with num_labels=0 the class token itself."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, sample_key: Tensor | None = None, **options: Any
    ) -> ClassificationOutput:
        """`pixel_values`: [n, channels, height, width]; `labels`: int64 [n]; `sample_key`: int64 [n], for drop
        path; `options`: interpolate_pos_encoding, output_attentions, output_hidden_states."""
        encoded = self.vit(pixel_values, sample_key=sample_key, **options)
        logits = self.classifier(encoded.last_hidden_state[:, 0])
        loss, metrics = None, {}
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
            metrics = {"accuracy": label_metrics(logits, labels)["correct"]}
        return ClassificationOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            metrics=metrics,
        )

    def forward_flops(self) -> int:
        return flops.encoder(self.config) + flops.linear(1, self.config.hidden_size, self.config.num_labels)
