"""ViTConfig: transformers' keys and defaults for a ViT, and the keys of our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import vitscale
from vitscale.config import model_rules
from vitscale.config.model_rules import MOST_LABELS, Size, Violation, pair
from vitscale.config.typed import typed_fields
from vitscale.errors import CheckpointError, ConfigError, DataError
from vitscale.files.model_folder import CONFIG, read_json, write_json
from vitscale.files.sources import HUB_OPTIONS, locate
from vitscale.text import did_you_mean

MODEL_TYPES = ("vit", "vit_mae")
# What transformers writes beside a model's own keys; none of it changes what a ViT computes.
GENERIC_KEYS = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "vitscale_version"}
GENERIC_KEYS |= {"return_dict", "use_cache", "_name_or_path", "_commit_hash", "_attn_implementation_autoset"}
GENERIC_KEYS |= {"finetuning_task", "gradient_checkpointing", "chunk_size_feed_forward", "tie_word_embeddings"}
# Of its generic keys, those that change what its models give, and what to do about them.
_REFUSED: dict[str, tuple[Any, str]] = {
    "return_dict": (True, "must be left out; give it to the model's call instead"),
    "quantization_config": (None, "its weights are quantized; save the model dequantized, with this key null"),
    "pruned_heads": ({}, "transformers 5 opens no such model; save it by the transformers 4 that pruned it, unpruned"),
}

# Our keys that change what a model computes, and their defaults: what transformers' ViT has.
OPTIONS: dict[str, Any] = {
    "use_cls_token": True, "num_register_tokens": 0, "rope_theta": None, "layer_scale_init_value": None,
    "qk_norm": False, "swiglu": False, "pooling": "cls", "fc_norm": False,
}  # fmt: skip


@dataclass(kw_only=True)
class ViTConfig:
    """The shape of a ViT. Keys down to `problem_type` are transformers' ViTConfig's, with its defaults.

    Every key after them is off by default. Raises ConfigError for values that no ViT can have.
    """

    model_type: ClassVar[str] = "vit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int | None = None  # None: hidden_size / num_attention_heads; stays what it was where heads are pruned
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
    encoder_stride: Size = 16  # SimMIM's decoder: pixels that a token becomes; the patch size
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"
    num_labels: int = 2  # 0: features, no classifier
    id2label: dict[int, str] | None = None  # the classes' names; their number is num_labels; None: LABEL_0, ...
    label2id: dict[str, int] | None = None  # the way back; follows from id2label where it is not given
    problem_type: str | None = None  # one of PROBLEM_TYPES; None: told from num_labels and the labels
    output_attentions: bool = False  # what a call gives that does not say
    output_hidden_states: bool = False

    use_cls_token: bool = True
    num_register_tokens: int = 0  # tokens that belong to no patch (Darcet et al. 2024, arXiv 2309.16588)
    position_embeddings: str = "learned"  # "sincos", which is fixed, or "none"
    rope_theta: float | None = None  # rotary positions of patches with this base, as DINOv3; its own is 100
    layer_scale_init_value: float | None = None  # what both branches of a block are scaled by (arXiv 2103.17239)
    qk_norm: bool = False  # a layer norm of every head's query and key (arXiv 2302.05442)
    swiglu: bool = False  # fc2(silu(a) * b), a and b the halves of fc1 (arXiv 2002.05202); hidden_act is not used
    pooling: str = "cls"  # what the classifier and the pooler see: the class token, or the "mean" of patch tokens
    fc_norm: bool = False  # the last norm stands after the pooling, none before; classification only, as timm

    drop_path_rate: float = 0.0  # of the last block; grows linearly from 0 at the first
    mask_ratio: float = 0.6  # share of what is hidden, of cells (SimMIM) or patches (MAE)
    mask_patch: int = 2  # side of SimMIM's cells, in patches
    label_smoothing: float = 0.0
    mim_weight: float = 1.0  # of the two losses of ViTForMultitaskPreTraining
    classification_weight: float = 1.0

    def __post_init__(self) -> None:
        typed_fields(self)
        for name in ("image_size", "patch_size", "encoder_stride"):
            setattr(self, name, _square_as_int(getattr(self, name)))
        self._name_labels()
        self._check()

    def _name_labels(self) -> None:
        """id2label in order, label2id and num_labels of one another."""
        if self.id2label is None and self.label2id is not None:
            self.id2label = {number: name for name, number in self.label2id.items()}
        if self.id2label is None:
            if not 0 <= self.num_labels <= MOST_LABELS:  # before as many names are made
                refuse("num_labels", self.num_labels, f"0 (features only) to {MOST_LABELS}")
            self.id2label = _generic_names(self.num_labels) or None
        if self.id2label is None:
            return
        names, self.num_labels = self.id2label, len(self.id2label)
        if names.keys() != set(range(len(names))):
            refuse("id2label", names, f"the names of the classes 0 to {len(names) - 1}, each once")
        self.id2label = {number: names[number] for number in range(len(names))}
        if self.label2id is None:
            self.label2id = {name: number for number, name in self.id2label.items()}
        for name, number in self.label2id.items():
            if self.id2label.get(number) != name:
                refuse("label2id", {name: number}, "the way back of id2label, or left out")

    def _check(self) -> None:
        """Raise the first rule that is broken."""
        for violation in self._violations():
            refuse(*violation)

    def _violations(self) -> Iterator[Violation]:
        values = vars(self)
        yield from model_rules.of_values(values)
        yield from model_rules.of_encoder(values, self.position_embeddings)
        if self.label_smoothing and self.problem_type not in (None, "single_label_classification"):
            yield Violation("label_smoothing", self.label_smoothing, f"0 for problem_type={self.problem_type}")

    @property
    def has_class_names(self) -> bool:
        """Whether id2label says more than LABEL_0, LABEL_1, ..., as transformers calls what has no name."""
        return self.id2label is not None and self.id2label != _generic_names(self.num_labels)

    @property
    def beyond_transformers(self) -> list[str]:
        """The keys that are set to what transformers' model of this kind cannot express."""
        keys = [name for name, usual in OPTIONS.items() if getattr(self, name) != usual]
        if self.position_embeddings == "none":
            keys.append("position_embeddings")
        if isinstance(self.encoder_stride, tuple):
            keys.append("encoder_stride")
        return keys

    @property
    def saved_model_type(self) -> str:
        """model_type on disk: one that transformers does not know where it would misread the model."""
        return f"vitscale_{self.model_type}" if self.beyond_transformers else self.model_type

    @property
    def head_width(self) -> int:
        """Of a head's query, key and value."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def attention_width(self) -> int:
        """Of all heads' queries together, and of keys and values: hidden_size unless heads were pruned."""
        return self.num_attention_heads * self.head_width

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches: the class token and the registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (height, width)."""
        return self.grid_of(*pair(self.image_size))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches along (height, width) of images of another size; DataError where they do not come out even."""
        patch_height, patch_width = pair(self.patch_size)
        if height % patch_height or width % patch_width:
            raise DataError(
                f"images of {height}x{width} pixels: must be whole patches of {patch_height}x{patch_width}; "
                "resize or crop them (ViTImageProcessor does)"
            )
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
        if self.id2label is not None and self.has_class_names:
            values["id2label"] = {str(number): name for number, name in self.id2label.items()}
            del values["num_labels"]
        else:
            values["id2label"] = values["label2id"] = None
        present = {name: value for name, value in values.items() if value is not None}
        return {"model_type": self.saved_model_type, **present}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """A config from config.json's content, ours or transformers'.

        Keys that transformers' class of this model_type ignores are passed over, see `ignored_keys`. ConfigError for
        another model_type, for values that cannot be honoured, and, in a file that only this library opens, for
        keys that are not known, since a later version may have written them.
        """
        known = (cls.model_type, f"vitscale_{cls.model_type}")
        if content.get("model_type", cls.model_type) not in known:
            raise ConfigError(f"model_type={content['model_type']!r}: must be {' or '.join(known)} for {cls.__name__}")
        names = {item.name for item in fields(cls)}
        if content.get("model_type") == f"vitscale_{cls.model_type}" and (unknown := cls.ignored_keys(content)):
            raise ConfigError(
                f"{cls.__name__}: unknown key(s) {', '.join(unknown)}; this model is not made of them: a later version "
                "of vitscale may have written it"
            )
        for name, (usual, remedy) in _REFUSED.items():
            if content.get(name) not in (None, usual):
                raise ConfigError(f"{name}={content[name]!r}: {remedy}")
        foreign = _foreign_keys(content)
        keys = {name: value for name, value in content.items() if name in names and name not in foreign}
        if isinstance(classes := keys.get("id2label"), dict):  # transformers takes numbers for names
            keys["id2label"] = {number: name if name is None else str(name) for number, name in classes.items()}
        if not _is_way_back(keys.get("id2label"), keys.get("label2id")):
            del keys["label2id"]  # transformers takes any; here it follows from id2label
        return cls(**keys)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """The config of a folder or hub name whose config.json is a ViT's or an MAE's, as one of this class.

        options: revision, cache_dir, local_files_only, token, subfolder, and other values for keys. A ViTConfig of an
        MAE is that of its encoder. Files of weights, timm's folders and transformers' other ViTs:
        AutoConfig.from_pretrained. CheckpointError for folders and names, ConfigError for keys.
        """
        where = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        path = locate(source, only=CONFIG, **where) / CONFIG
        content = read_json(path)
        kind = str(content.get("model_type")).removeprefix("vitscale_")
        if kind not in MODEL_TYPES:
            raise CheckpointError(
                f"{path}: model_type={content.get('model_type')!r}: is no {cls.__name__}'s; "
                f"vitscale.AutoConfig.from_pretrained(..., config_class={cls.__name__}) opens more"
            )
        try:
            config = cls.from_dict(content if kind == cls.model_type else cls._of_other_type(content))
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return config.overridden(options)

    @classmethod
    def _of_other_type(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Of another objective's config.json the encoder's keys; the objective's keep their defaults."""
        dropped = {"model_type", *_foreign_keys(content)}
        return {name: value for name, value in content.items() if name not in dropped} | {"mask_ratio": cls.mask_ratio}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json. CheckpointError if the folder cannot be written."""
        write_json(Path(folder) / CONFIG, self.content())

    def content(self) -> dict[str, Any]:
        """What config.json says: `to_dict`, and who wrote it."""
        return {**self.to_dict(), "vitscale_version": vitscale.__version__}

    def overridden(self, overrides: dict[str, Any]) -> Self:
        """A config with other values for some keys; the labels' names go where their number is another one.

        ConfigError for a key that there is not, naming the nearest.
        """
        keys = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in overrides:
            if name not in keys:
                near = did_you_mean(name.removeprefix("torch_"), [*keys, "dtype", "token", "revision"])
                raise ConfigError(f"{name}={overrides[name]!r}: {type(self).__name__} has no such key{near}")
        names, count = overrides.get("id2label"), overrides.get("num_labels")
        if isinstance(names, dict) and count not in (None, len(names)):
            raise ConfigError(
                f"num_labels={count}: must be {len(names)}, the number of names in id2label; leave it out"
            )
        if names is not None or overrides.get("label2id") is not None or count not in (None, self.num_labels):
            keys |= {"id2label": None, "label2id": None}
        return type(self)(**keys | overrides)

    @classmethod
    def ignored_keys(cls, content: dict[str, Any]) -> list[str]:
        """The keys of config.json that say something, and nothing that a model of this class is made of."""
        unknown = content.keys() - {item.name for item in fields(cls)} - GENERIC_KEYS - _REFUSED.keys()
        return sorted({name for name in unknown if content[name] not in (None, False, [], {})} | _foreign_keys(content))


def _foreign_keys(content: dict[str, Any]) -> set[str]:
    """Keys by the names of OPTIONS, in a file of a `model_type` whose class in transformers ignores them.

    They are not ours: with these values `saved_model_type` would have been vitscale_*. As ours they would change what
    the model computes, as `pooling: mean` does, which transformers' Trainer hands on from an MAE made here.
    """
    kind = content.get("model_type")
    if kind not in MODEL_TYPES:
        return set()
    usual = {name: (value,) for name, value in OPTIONS.items()} | {"position_embeddings": ("learned", "sincos")}
    if kind == "vit_mae":
        del usual["pooling"]  # nothing in an MAE is pooled: ours says there what its encoder's classifier will see
    return {name for name, values in usual.items() if content.get(name) not in (None, *values)}


def _generic_names(count: int) -> dict[int, str]:
    return {number: f"LABEL_{number}" for number in range(count)}


def _is_way_back(id2label: Any, label2id: Any) -> bool:
    """Whether label2id says what id2label does, as JSON has them; or there is but one of them."""
    if not isinstance(id2label, dict) or label2id is None:
        return True
    if not isinstance(label2id, dict):
        return False
    names = {str(number): name for number, name in id2label.items()}
    return all(names.get(str(number)) == name for name, number in label2id.items())


def _square_as_int(size: Size) -> Size:
    """Equal sides as one number, as transformers' code wants them."""
    height, width = pair(size)
    return height if height == width else (height, width)


def refuse(name: str, value: Any, rule: str) -> None:
    """Raise the ConfigError of a key."""
    raise ConfigError(f"{name}={value!r}: must be {rule}")
