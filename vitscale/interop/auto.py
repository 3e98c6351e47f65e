"""The model of a folder or hub name, told by its config.json, by the calls of transformers' Auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitscale.errors import CheckpointError
from vitscale.files.model_folder import CONFIG, read_json
from vitscale.files.sources import HUB_OPTIONS, locate
from vitscale.interop.config_files import architecture, config_as, read_config, require_model_type
from vitscale.interop.image_processing import ViTImageProcessor
from vitscale.interop.loading import config_of, keys_for_files, open_by_tensors
from vitscale.interop.processor_files import processor_file
from vitscale.models.auto import CLASSES
from vitscale.models.classification import ViTForImageClassification
from vitscale.models.configuration import ViTConfig
from vitscale.models.simmim import ViTForMaskedImageModeling
from vitscale.models.vit import ViTModel


class AutoConfig:
    """A config of the class that model_type, or the tensors of a file, tell: ViTConfig or ViTMAEConfig."""

    @staticmethod
    def from_pretrained(
        source: str | Path, *, config_class: type[ViTConfig] | None = None, take: str | None = None, **options: Any
    ) -> Any:
        """As a config class's own from_pretrained; config_class: the class that it becomes one of."""
        where, overrides = _parted(options)
        config = config_of(source, overrides, take, **where)
        return config_as(config_class or type(config), config).overridden(overrides)


# from_config: a model whose values are not yet of any use.
class AutoModel:
    """The encoder, as a ViTModel: of an MAE too, which in transformers would hide patches."""

    from_pretrained, from_config = ViTModel.from_pretrained, ViTModel


class AutoModelForImageClassification:
    """A classifier; a folder without one gives it a new head, and says so."""

    from_pretrained, from_config = ViTForImageClassification.from_pretrained, ViTForImageClassification


class AutoModelForMaskedImageModeling:
    """SimMIM's model; a folder without its decoder gives it a new one, and says so."""

    from_pretrained, from_config = ViTForMaskedImageModeling.from_pretrained, ViTForMaskedImageModeling


class AutoModelForPreTraining:
    """The model that was pretrained: MAE's, SimMIM's or the multitask one, as `architectures` or the tensors say."""

    @staticmethod
    def from_pretrained(source: str | Path, **options: Any) -> Any:
        """As the from_pretrained of that class. CheckpointError where the folder holds no such model."""
        where, overrides = _parted(dict(options))
        opened = open_by_tensors(source, keys_for_files(None, overrides), overrides.get("take"), **where)
        if opened is None:
            path = locate(source, only=CONFIG, **where) / CONFIG
            content = read_json(path)
            read_config(path, content)  # a model of another type is refused in its words
            named, says = architecture(path, content), f"{path}: architectures names"
        else:
            named, says = type(opened.model).__name__, f"{source}: holds"
        if CLASSES.get(named, ViTModel) in (ViTModel, ViTForImageClassification):
            raise CheckpointError(
                f"{says} {named or 'no class'}, which is not for pretraining; take AutoModel, "
                "or name the class that you want, say ViTForMaskedImageModeling"
            )
        return CLASSES[named].from_pretrained(source, **options)


class AutoImageProcessor:
    """`from_pretrained` as transformers' AutoImageProcessor has it, for the models that this library opens."""

    @staticmethod
    def from_pretrained(source: str | Path, *, take: str | None = None, **options: Any) -> ViTImageProcessor:
        """See ViTImageProcessor.from_pretrained; of a file of weights and a folder of timm, what `open_model` gives.

        CheckpointError where config.json tells of another model.
        """
        where, overrides = _parted(options)
        try:
            path = processor_file(source, where)
        except CheckpointError:
            known = keys_for_files(None, overrides)
            opened = open_by_tensors(source, known, take, **where)
            if opened is None:
                raise
            return opened.processor.overridden({name: overrides[name] for name in overrides.keys() - known})
        config = path.with_name(CONFIG)
        model_type = read_json(config).get("model_type") if config.is_file() else None
        if model_type is not None:
            require_model_type(config, model_type)
        return ViTImageProcessor.from_pretrained(path, **overrides)


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where to look, and the rest."""
    where = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    return where, options
