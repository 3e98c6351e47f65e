"""What a user names a model by -> the folder that holds its files: a model's folder, a run's, or a hub name."""

from __future__ import annotations

import re
from pathlib import Path

from vitscale.errors import CheckpointError, ConfigError
from vitscale.files.model_folder import CONFIG, WEIGHT_FILES, WEIGHTS, stands_for_folder
from vitscale.run_folder import RunFolder
from vitscale.text import listed, nearest

# State of training beside the weights, by the names of DeepSpeed and of transformers' Trainer.
_NO_WEIGHTS = re.compile(r"optim|scheduler|rng_state|training_args|scaler")
HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token", "subfolder")  # of `locate`


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str = "",
    only: str | None = None,
) -> Path:
    """The folder of a model's files, downloaded where `source` is a name on the hub.

    source: a model's folder or the weights in it, a run's folder (its model/ is meant), or a hub name such as
    facebook/vit-mae-base; what is on this disk goes before the hub. only: the one file that is
    needed, so that nothing else is downloaded (default: config.json, the weights and
    preprocessor_config.json where there is one). The other options are huggingface_hub's.
    CheckpointError, naming what comes nearest, where there is no such model.
    """
    path = Path(source).expanduser()
    path = path.parent if stands_for_folder(path) else path
    if path.is_dir():
        if revision not in (None, "main"):
            raise ConfigError(f"revision={revision!r}: is for the hub, and {source} is a folder; leave it out")
        return _local(path, subfolder, only or CONFIG)
    if path.is_file():
        raise CheckpointError(
            f"{source}: is a file; name the folder that holds {CONFIG} and the weights, or make one of it: "
            f"vitscale convert {source} NEW_FOLDER --to hf"
        )
    name = str(source)
    if not _may_be_hub_name(source):
        raise CheckpointError(f"{source}: no such folder{_nearest_folder(path)}")
    from vitscale.files import hub

    return hub.download(
        name,
        revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        subfolder=subfolder,
        only=only,
        advice=_nearest_folder(path),
    )


def _local(path: Path, subfolder: str, file: str) -> Path:
    run = RunFolder(path)
    for folder in (path / subfolder, run.model):
        if (folder / file).is_file():
            return folder
    if run.config.is_file():
        raise CheckpointError(
            f"{path}: is a run's folder without {run.model.name}/{file}: `vitscale export {path}` "
            "writes its newest checkpoint there"
        )
    if (path / "manifest.json").is_file():
        raise CheckpointError(f"{path}: is a checkpoint; `vitscale export {path}` makes a model's folder of it")
    instead = _instead(path / subfolder) if file == CONFIG else f"a model's folder has {CONFIG} and {WEIGHTS}"
    raise CheckpointError(f"{path / subfolder}: holds no {file}; {instead}")


def _instead(folder: Path) -> str:
    """What to name instead of a folder that is no model's."""
    if (folder / ".metadata").is_file():
        return (
            "it is a checkpoint of torch.distributed.checkpoint; make a file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
        )
    below = [path for depth in ("*", "*/*") for path in folder.glob(depth)]
    models = [path.parent for path in below if path.name == CONFIG]
    weights = [path for path in below if path.suffix in WEIGHT_FILES and not _NO_WEIGHTS.search(path.name)]
    found = sorted(models or weights, key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        return f"a model's folder has {CONFIG} and {WEIGHTS}"
    return f"name what is in it: {listed(found, 3)}"


def _may_be_hub_name(source: str | Path) -> bool:
    """`name` or `owner/name`, and not written as a path (./name, ~/name, a Path, a trailing slash)."""
    name = str(source)
    return isinstance(source, str) and name.count("/") < 2 and not name.startswith((".", "/", "~")) and name[-1:] != "/"


def _nearest_folder(path: Path) -> str:
    try:
        beside = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        return f", and none of {path.parent}" if not path.parent.is_dir() and path.parent != Path() else ""
    near = nearest(path.name, beside, 0.7)
    return "" if near is None else f"; did you mean {path.parent / near}?"
