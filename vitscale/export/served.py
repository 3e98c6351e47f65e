"""What an exported file computes: pixels in, plain tensors out, for any number of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vitscale.config.model_rules import pair
from vitscale.models.vit import ViTPreTrainedModel

INPUT = "pixel_values"
LEAST_PATCHES = 2  # a side of what dynamic_size takes: torch.export holds a dimension of 1 for a constant


class Served(nn.Module):
    """A model as it is used after training: `forward(pixel_values)` gives the tensors of `output_names`.

    A model with a classifier gives its logits; ViTModel its last_hidden_state, and its pooler_output where it
    has a pooler; one that is trained by hiding patches gives its encoder's last_hidden_state, all patches visible.
    """

    def __init__(self, model: ViTPreTrainedModel, dynamic_size: bool = False) -> None:
        """dynamic_size: by interpolate_pos_encoding images of LEAST_PATCHES whole patches or more a side."""
        super().__init__()
        self.config = model.config
        self.dynamic_size = dynamic_size
        self.is_classifier = hasattr(model, "classifier")
        self.model = model if self.is_classifier else model.base_model
        pooled = getattr(self.model, "pooler", None) is not None
        self.output_names = ("logits",) if self.is_classifier else ("last_hidden_state", "pooler_output")[: 1 + pooled]
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """`pixel_values`: float32 [n, channels, height, width]."""
        output = self.model(pixel_values, interpolate_pos_encoding=self.dynamic_size)
        return tuple(output[name] for name in self.output_names)

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Which dimensions of the input vary, and in what steps, as torch.export takes it."""
        (height, width), varying = pair(self.config.patch_size), {0: Dim("batch")}
        if self.dynamic_size:
            varying |= {2: height * Dim("rows"), 3: width * Dim("columns")}
        return {INPUT: varying}

    @property
    def num_labels(self) -> int:
        """How many classes the first output tells apart; 0 where it is features."""
        return self.config.num_labels if self.is_classifier else 0

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def random_images(self, n: int, more_patches: tuple[int, int] = (0, 0), seed: int = 0) -> Tensor:
        """Normal noise [n, channels, height, width] of the model's size, or of some patches more a side."""
        sides = zip(pair(self.config.image_size), pair(self.config.patch_size), more_patches, strict=True)
        size = [max(side + more * patch, min(side, LEAST_PATCHES * patch)) for side, patch, more in sides]
        return torch.randn(n, self.config.num_channels, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trace(served: Served) -> ExportedProgram:
    """The graph by torch.export, for any number of images, and with dynamic_size any number of patches.

    What would fix the number or the size is an error here, never a silent constant.
    """
    # The model's own size is a special case of its forward, so another one is shown to the tracer.
    example = served.random_images(2, (1, 2) if served.dynamic_size else (0, 0))
    program = torch.export.export(served, (example,), dynamic_shapes=served.dynamic_shapes)
    for node in program.graph.nodes:  # it says where the code lay on this machine, and is most of a small file
        node.meta.pop("stack_trace", None)
    return program
