"""A file of weights, whoever wrote it, as the tensors of one model by their plain names.

Frameworks wrap a model's tensors: under keys ("state_dict", "model", "teacher"), and under a prefix that every
name carries ("module.", "_orig_mod.", "backbone."). Both are found by where a whole encoder lies, whatever they are
called, taken off, and told in `notes`; words count only where a file has several encoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitscale.errors import CheckpointError, ConfigError
from vitscale.interop.keymaps import ENCODERS
from vitscale.interop.weight_files import SAVE_STATE, Array, Inert, read_file
from vitscale.text import listed

# What every encoder has: its patch projection, by the names of timm (and MAE, DINO, SimMIM) and of transformers, whose
# DINOv3 has a name of its own.
TIMM_ANCHOR, DINOV3_ANCHOR = "patch_embed.proj.weight", "embeddings.patch_embeddings.weight"
HF_ANCHORS = ("embeddings.patch_embeddings.projection.weight", DINOV3_ANCHOR)
_OWN_PREFIX = re.compile(rf"(?<![^.])({'|'.join(ENCODERS)})\.$")
# Of several sets in one file that with the first of these in its name is taken: averages and teachers before what was
# trained by gradients, but what MoCo v3 evaluates.
_PREFERRED = ("base_encoder", "teacher", "ema", "swa", "avg", "average", "averaged", "shadow", "target", "momentum")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "backbone", "encoder", "model", "vit", "state_dict"}
_DEEPEST = 5  # mappings within mappings that are looked through


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model."""

    tensors: dict[str, Tensor]  # by their names in timm's or transformers' module, without a prefix
    notes: list[str] = field(default_factory=list)  # what was taken off, chosen or not used
    content: Mapping[str, Any] = field(default_factory=dict)  # the whole file: what lies beside the tensors


def read_checkpoint(path: Path, take: str | None = None) -> Checkpoint:
    """The tensors of a file of weights (.safetensors, or what torch.save wrote).

    take: which set of weights, where a file has several ("student"). CheckpointError if the file is broken, holds
    no encoder, or holds more than tensors and plain values; ConfigError if there is no set of that name.
    """
    return unwrap(read_file(path), str(path), take)


def unwrap(content: Mapping[Any, Any], where: str, take: str | None = None) -> Checkpoint:
    """What `read_checkpoint` gives, of content that has been read; `where` names it in errors."""
    sets = [each for keys, mapping in _mappings(content, ()) for each in _sets(keys, _tensors(mapping))]
    if not sets:
        raise CheckpointError(_no_encoder(content, where))
    named = _named(sets)
    name = _chosen(named, where, take)
    chosen, notes = named[name], []
    if len(sets) > 1:
        other = next(each for each in named if each != name)
        hint = f", take={other} (--take {other}) takes another" if take is None else ""
        notes.append(f"it has {len(sets)} sets of weights: {listed(named)}; {name} is taken{hint}")
    elif chosen.keys:
        notes.append(f"the weights lie under {'.'.join(chosen.keys)!r}")
    if chosen.prefix:
        notes.append(f"the prefix {chosen.prefix!r} is taken off {len(chosen.tensors)} names")
    if chosen.extra:
        notes.append(f"not used, beside the model: {listed(chosen.extra)}")
    if any(tensor.numel() == 0 for name, tensor in chosen.tensors.items() if name.endswith((TIMM_ANCHOR, *HF_ANCHORS))):
        raise CheckpointError(
            f"{where}: its tensors are empty, as DeepSpeed's ZeRO-3 leaves them; `vitscale checkpoint "
            "import-deepspeed` takes the folder that it lies in, and writes a file of weights"
        )
    return Checkpoint(_dense(chosen.tensors, where), notes, content)


def _dense(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Sparse and quantized tensors as plain ones; CheckpointError for what has no numbers in floating point."""
    dense, wrong = {}, []
    for name, tensor in tensors.items():
        is_integer = tensor.ndim > 1 and not tensor.is_floating_point() and not tensor.is_quantized  # but counters
        if tensor.is_meta or tensor.is_nested or is_integer:
            wrong.append(f"{name} ({tensor.dtype}{', on meta' * tensor.is_meta}{', nested' * tensor.is_nested})")
        elif tensor.is_quantized:
            dense[name] = tensor.dequantize()
        else:
            dense[name] = tensor if tensor.layout is torch.strided else tensor.to_dense()
    if wrong:
        raise CheckpointError(
            f"{where}: tensors without numbers in floating point: {listed(wrong)}; load the model, dequantize it, and "
            "save its state_dict()"
        )
    return dense


@dataclass(frozen=True, eq=False)
class _Set:
    """A whole encoder's tensors somewhere in a file."""

    keys: tuple[str, ...]  # of the mappings that it lies in
    prefix: str
    tensors: dict[str, Tensor]
    extra: list[str]  # names of other tensors in the same mapping

    @property
    def words(self) -> list[str]:
        """All that it may be named by."""
        return [*self.keys, *filter(None, self.prefix.split("."))]


def _named(sets: list[_Set]) -> dict[str, _Set]:
    """The sets by what tells each from the others: a word of its own, rather no wrapper's, else its whole place."""
    named: dict[str, _Set] = {}
    for each in sets:
        others = {word for other in sets if other is not each for word in other.words}
        unique = sorted((word for word in each.words if word not in others), key=_WRAPPERS.__contains__)
        name = next(iter(unique), ".".join(each.words) or "model")
        named[name if name not in named else f"{name} again"] = each
    return named


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Those that a mapping holds by name, NumPy's arrays too."""
    values = {key: value.tensor if isinstance(value, Array) else value for key, value in mapping.items()}
    return {key: each.detach() for key, each in values.items() if isinstance(each, Tensor) and isinstance(key, str)}


def _mappings(content: Mapping[Any, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Every mapping, and the keys that lead to it."""
    yield keys, content
    if len(keys) < _DEEPEST:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _mappings(value, (*keys, str(key)))


def _sets(keys: tuple[str, ...], tensors: dict[str, Tensor]) -> list[_Set]:
    """The encoders among these tensors, each with what lies under its prefix."""
    prefixes = {prefix: None for name in tensors if (prefix := _prefix(name)) is not None}
    rest = dict(tensors)
    encoders = []
    # The longest first: what lies under "ema." is not of the model that has no prefix.
    for prefix in sorted(prefixes, key=len, reverse=True):
        encoder = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
        outer = prefix.removesuffix("encoder.")
        if prefix.endswith("encoder.") and f"{outer}decoder.0.weight" in rest:  # SimMIM: the decoder lies outside
            encoder |= {
                name: rest.pop(outer + name) for name in ("decoder.0.weight", "decoder.0.bias") if outer + name in rest
            }
        encoders.append((prefix, encoder))
    return [_Set(keys, prefix, encoder, sorted(rest)) for prefix, encoder in reversed(encoders)]


def _prefix(name: str) -> str | None:
    """What stands before an encoder's patch projection; None for the name of another tensor.

    transformers' own, such as "vit.", is no prefix: its heads lie beside it.
    """
    for anchor in (TIMM_ANCHOR, *HF_ANCHORS):
        if name.endswith(anchor) and name.removesuffix(anchor)[-1:] in ("", "."):
            before = name.removesuffix(anchor)
            return _OWN_PREFIX.sub("", before) if anchor in HF_ANCHORS else before
    return None


def _chosen(named: dict[str, _Set], where: str, take: str | None) -> str:
    """The name of the set to take. ConfigError where none, or more than one, is meant."""
    counted = listed(f"{name} ({len(each.tensors)} tensors)" for name, each in named.items())
    if take is not None:
        meant = [take] if take in named else [name for name, each in named.items() if take in each.words]
        if len(meant) == 1:
            return meant[0]
        names = f"names {len(meant) or 'none'} of the sets of weights in {where}: {counted}"
        raise ConfigError(f"take={take!r}: {names}; name one, or leave take out")
    if len(named) == 1:
        return next(iter(named))
    for word in _PREFERRED:
        preferred = [
            name
            for name, each in named.items()
            if word in {*each.words, *re.split(r"[_.\d]", ".".join(each.words).lower())}
        ]
        if len(preferred) == 1:
            return preferred[0]
    raise ConfigError(
        f"{where}: has {len(named)} sets of weights: {counted}; name one: take=NAME (--take NAME of a verb, "
        "model.init_take=NAME of a run)"
    )


def _no_encoder(content: Mapping[Any, Any], where: str) -> str:
    mappings = list(_mappings(content, ()))
    names = [name for _, mapping in mappings for name in _tensors(mapping)]
    values = (((*keys, str(key)), value) for keys, mapping in mappings for key, value in mapping.items())
    module = next((each for each in values if isinstance(each[1], Inert) and each[1].is_module), None)
    if module is not None:
        keys, value = module
        return f"{where}: holds a {type(value).__name__} under {'.'.join(keys)!r}, not its tensors; {SAVE_STATE}"
    if "optim" in Path(where).name or ("optimizer_state_dict" in content and not names):
        return (
            f"{where}: holds an optimizer's state, not a model's weights; name the file of the model beside it "
            "(DeepSpeed's is mp_rank_00_model_states.pt)"
        )
    holds = f"its tensors are {listed(names)}" if names else f"it holds {listed(map(str, content)) or 'nothing'}"
    return (
        f"{where}: must hold a Vision Transformer by the names of timm or transformers, with a tensor that ends in "
        f"{TIMM_ANCHOR} or {HF_ANCHORS[0]}; {holds}"
    )
