"""SimMIM and classification on one encoder, in one forward of the masked image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitscale.config.model_rules import pair
from vitscale.errors import ConfigError, DataError
from vitscale.models import flops
from vitscale.models.configuration import ViTConfig, refuse
from vitscale.models.losses import Loss, label_cross_entropy, label_metrics
from vitscale.models.outputs import MultitaskOutput, can_return_tuple
from vitscale.models.simmim import MaskedImageModel


class ViTForMultitaskPreTraining(MaskedImageModel):
    """loss = mim_weight * L1 on what is hidden + classification_weight * cross-entropy from the pooled features."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        if config.num_labels < 1:
            raise ConfigError(f"num_labels={config.num_labels}: {type(self).__name__} needs at least 1")
        if config.problem_type not in (None, "single_label_classification"):
            refuse("problem_type", config.problem_type, f"single_label_classification for {type(self).__name__}")
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        sample_key: Tensor | None = None,
        loss: Loss | None = None,
        **options: Any,
    ) -> MultitaskOutput:
        """`pixel_values`: [n, channels, height, width]; `labels`: int64 [n], -1 where a sample has none, or
        probabilities [n, num_labels]; `loss`: one of your own for the labels instead of cross-entropy, called
        with (logits in float32, all labels); `bool_masked_pos`, `sample_key`, `options`: see
        ViTForMaskedImageModeling."""
        if self.training and labels is None:
            raise DataError(f"{type(self).__name__} needs labels to train: int64, one a sample, -1 where there is none")
        bool_masked_pos = self.hidden(pixel_values, bool_masked_pos, sample_key)
        encoded = self.vit(pixel_values, bool_masked_pos, sample_key=sample_key, **options)
        reconstruction = self.decode(encoded.last_hidden_state, pixel_values)
        logits = self.classifier(self.vit.pool(encoded.last_hidden_state))

        config, losses, metrics = self.config, [], {}
        if bool_masked_pos is not None:
            mim_loss = self.pixel_loss(pixel_values, reconstruction, bool_masked_pos, pair(config.patch_size))
            losses.append(config.mim_weight * mim_loss)
            metrics["mim_loss"] = mim_loss.detach()
        if labels is not None:
            if loss is None:
                classification_loss = label_cross_entropy(logits, labels, config.label_smoothing)
            else:
                classification_loss = loss(logits.float(), labels)
            losses.append(config.classification_weight * classification_loss)
            metrics |= {"classification_loss": classification_loss.detach(), **label_metrics(logits, labels)}
        return MultitaskOutput(
            loss=sum(losses) if losses else None,
            reconstruction=reconstruction,
            logits=logits,
            last_hidden_state=encoded.last_hidden_state,
            bool_masked_pos=bool_masked_pos,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            metrics=metrics,
        )

    def forward_flops(self) -> int:
        return super().forward_flops() + flops.linear(1, self.config.hidden_size, self.config.num_labels)
