"""ViTConfig: transformers' keys and defaults for a ViT, and the keys of our own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from vitscale.config.check import pair
from vitscale.errors import ConfigError

Size = int | tuple[int, int]

# What transformers writes beside a model's own keys; none of it changes what a ViT computes.
GENERIC_KEYS = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "vitscale_version"}
GENERIC_KEYS |= {"label2id", "return_dict", "output_attentions", "output_hidden_states", "use_cache"}


@dataclass(kw_only=True)
class ViTConfig:
    """The shape of a ViT. Keys down to `num_labels` are transformers' ViTConfig's, with its defaults.

    Raises ConfigError for values that no ViT can have.
    """

    model_type: ClassVar[str] = "vit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12  # MAE's and timm's is 1e-6
    image_size: Size = 224  # pixels: a square's side, or (height, width)
    patch_size: Size = 16
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: int = 16  # SimMIM's decoder: pixels a side that a token becomes; the patch size
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"
    num_labels: int = 2
    id2label: dict[int, str] | None = None  # the classes' names; their number is num_labels
    problem_type: str | None = None

    drop_path_rate: float = 0.0  # of the last block; grows linearly from 0 at the first
    position_embeddings: str = "learned"  # or "sincos", which is fixed
    mask_ratio: float = 0.6  # share of what is hidden, of cells (SimMIM) or patches (MAE)
    mask_patch: int = 2  # side of SimMIM's cells, in patches
    label_smoothing: float = 0.0
    mim_weight: float = 1.0  # of the two losses of ViTForMultitaskPreTraining
    classification_weight: float = 1.0

    def __post_init__(self) -> None:
        self.image_size, self.patch_size = _size(self.image_size), _size(self.patch_size)
        if self.id2label is not None:
            self.id2label = {int(number): name for number, name in self.id2label.items()}
            self.num_labels = len(self.id2label)
        self._check()

    def _check(self) -> None:
        for side, patch in zip(pair(self.image_size), pair(self.patch_size), strict=True):
            if patch < 1 or side < patch or side % patch:
                refuse("image_size", self.image_size, f"a multiple of patch_size={self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            refuse("hidden_size", self.hidden_size, f"a multiple of num_attention_heads={self.num_attention_heads}")
        if self.position_embeddings not in ("learned", "sincos"):
            refuse("position_embeddings", self.position_embeddings, "learned or sincos")
        if self.position_embeddings == "sincos" and self.hidden_size % 4:
            refuse("hidden_size", self.hidden_size, "a multiple of 4 for sincos position embeddings")
        if not 0 <= self.drop_path_rate < 1:
            refuse("drop_path_rate", self.drop_path_rate, "in [0, 1)")
        if self.problem_type not in (None, "single_label_classification"):
            refuse("problem_type", self.problem_type, "single_label_classification, the only kind there is")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (height, width)."""
        (height, width), (patch_height, patch_width) = pair(self.image_size), pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: its pixels times the channels."""
        height, width = pair(self.patch_size)
        return height * width * self.num_channels

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, which transformers' config class reads too."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if self.id2label is not None:
            values["id2label"] = {str(number): name for number, name in self.id2label.items()}
            values["label2id"] = {name: number for number, name in self.id2label.items()}
            del values["num_labels"]
        present = {name: value for name, value in values.items() if value is not None}
        return {"model_type": self.model_type, **present}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """A config from config.json's content, ours or transformers'.

        Raises ConfigError for another model_type and for keys that are not known, since they may
        change what the model computes.
        """
        if content.get("model_type", cls.model_type) != cls.model_type:
            raise ConfigError(f"model_type={content['model_type']!r}: must be {cls.model_type!r} for {cls.__name__}")
        names = {item.name for item in fields(cls)}
        unknown = sorted(name for name in content.keys() - names - GENERIC_KEYS if not name.startswith("_"))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown key(s) {', '.join(unknown)}; this model is not made of them")
        return cls(**{name: value for name, value in content.items() if name in names})


def _size(value: Any) -> Size:
    """An int, or (height, width); equal sides become an int, as transformers' code wants them."""
    height, width = pair(value if isinstance(value, int) else tuple(value))
    return height if height == width else (height, width)


def refuse(name: str, value: Any, rule: str) -> None:
    """Raise the ConfigError of a key."""
    raise ConfigError(f"{name}={value!r}: must be {rule}")
