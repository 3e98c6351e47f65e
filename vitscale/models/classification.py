"""Supervised classification from pooled features (Dosovitskiy et al. 2021, arXiv 2010.11929), and regression."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitscale.models import flops
from vitscale.models.configuration import ViTConfig
from vitscale.models.losses import Loss, are_classes, classification_loss, label_metrics, problem_type
from vitscale.models.outputs import ClassificationOutput, can_return_tuple
from vitscale.models.vit import ViTModel, ViTPreTrainedModel


class ViTForImageClassification(ViTPreTrainedModel):
    """A linear layer on the class token or on the mean of the patch tokens (config.pooling).

    With num_labels=0 there is no layer: the logits are the pooled features, and the output has
    `last_hidden_state` too.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.fc_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.fc_norm else nn.Identity()
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        self.loss_function: Loss | None = None  # of a call that gives none; None: classification_loss

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        sample_key: Tensor | None = None,
        loss: Loss | None = None,
        **options: Any,
    ) -> ClassificationOutput:
        """`pixel_values`: [n, channels, height, width]; `labels`: see `classification_loss`; `loss`: one of
        your own instead of it, called with (logits in float32, labels); `sample_key`: int64 [n], for drop
        path; `options`: interpolate_pos_encoding, output_attentions, output_hidden_states."""
        encoded = self.vit(pixel_values, sample_key=sample_key, **options)
        logits = self.classifier(self.fc_norm(self.vit.pool(encoded.last_hidden_state)))
        value, metrics = None, {}
        if labels is not None:
            config = self.config
            loss = loss or self.loss_function
            value = classification_loss(config, logits, labels) if loss is None else loss(logits.float(), labels)
            if are_classes(logits, labels) and problem_type(config, labels) == "single_label_classification":
                metrics = {"accuracy": label_metrics(logits, labels)["correct"]}
        return ClassificationOutput(
            loss=value,
            logits=logits,
            last_hidden_state=None if self.config.num_labels else encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            metrics=metrics,
        )

    def forward_flops(self) -> int:
        return flops.encoder(self.config) + flops.linear(1, self.config.hidden_size, self.config.num_labels)
