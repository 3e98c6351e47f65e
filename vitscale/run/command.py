"""The verbs that look at data, and at a run: `stats`, `look`, `simulate`, `replay`."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vitscale.errors import ConfigError
from vitscale.run_folder import DONE
from vitscale.text import above_zero

if TYPE_CHECKING:
    from vitscale.config.schema import RunConfig

_DATA = "shards, as data.train names them (several patterns too), or a folder of images"
_KEY = re.compile(r"\w+(\.\w+)+=")  # as a word among names of files begins; a file's can be written ./a.b=c
_MOST_SHOWN = 256


def register(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    added = verb("stats", _stats, "what a data set holds: mean and deviation, sizes, formats, labels, broken images")
    added.add_argument("data", metavar="DATA", nargs="+", help=_DATA)
    _takes_keys(added, "data.label=json.class")
    added.add_argument("--images", type=above_zero, metavar="N", help="of so many samples (default: all)")
    added.add_argument("--out", metavar="stats.json", help="all of it, for programs")

    added = verb("look", _look, "samples of DATA, or the very images of a step of a run, as one picture")
    added.add_argument("source", metavar="DATA|CONFIG.yaml", nargs="+", help=f"{_DATA}; or a run's config")
    _takes_keys(added, "augment.preset=deit3")
    added.add_argument("--step", type=above_zero, metavar="T", help="of CONFIG, as in metrics.jsonl (default: 1)")
    added.add_argument(
        "--images", type=above_zero, default=32, metavar="N", help=f"(default: 32, at most {_MOST_SHOWN})"
    )
    added.add_argument("--finetune", action="store_true", help="CONFIG is one for `vitscale finetune`")
    added.add_argument("--out", required=True, metavar="look.png")

    added = verb(
        "simulate", _simulate, "what many nodes would read: shards, bytes, cache hits, start-up; reads no image"
    )
    added.add_argument("config", metavar="CONFIG.yaml")
    _takes_keys(added, "data.index=index.json data.cache_bytes=1000000000000")
    added.add_argument("--nodes", type=above_zero, required=True, metavar="N")
    added.add_argument("--gpus", type=above_zero, default=8, metavar="N", help="of a node (default: 8)")
    added.add_argument(
        "--steps", type=above_zero, default=200, metavar="N", help="of a node's cache (default: 200, at most 2 epochs)"
    )

    added = verb("replay", _replay, "run one step of a run again, to see where a value is not finite first")
    added.add_argument("run", metavar="RUN_FOLDER")
    added.add_argument("--step", type=above_zero, required=True, metavar="N", help="as in metrics.jsonl")
    text = "with the batches that were left out when the run last went back"
    added.add_argument("--taken-back", action="store_true", help=text)


def _takes_keys(added: argparse.ArgumentParser, example: str) -> None:
    added.add_argument("overrides", metavar="dotted.key=value", nargs="*", help=f"say {example}")


def _stats(arguments: argparse.Namespace) -> int:
    from vitscale.files.atomic import write_atomically
    from vitscale.prepare.samples import open_samples
    from vitscale.prepare.stats import as_text, count, summary

    if arguments.out is not None and not Path(arguments.out).absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: must be a file in a folder that is there")
    config = _config_of_data(*_split(arguments.data, arguments.overrides))
    with tempfile.TemporaryDirectory() as scratch:
        samples = open_samples(config.data, Path(scratch))
        threads = config.data.threads or arguments.world.cores_per_rank
        told = summary(count(samples, config.data, arguments.images, config.run.seed, threads), samples)
    print(as_text(told, samples.where, config.data.max_bad_fraction))
    if arguments.out is not None:
        try:
            write_atomically(Path(arguments.out), json.dumps(told, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {arguments.out}: cannot be written ({error.strerror}); name another") from None
    return DONE


def _look(arguments: argparse.Namespace) -> int:
    from vitscale.config.load import load_config
    from vitscale.run.look import images_of_step, raw_samples

    (source, *more), keys = _split(arguments.source, arguments.overrides)
    out = Path(arguments.out)
    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: must be a .png in a folder that is there")
    if arguments.images > _MOST_SHOWN:
        raise ConfigError(
            f"--images {arguments.images}: a picture shows at most {_MOST_SHOWN}; look at them in several"
        )
    if not source.endswith((".yaml", ".yml")):
        if arguments.step or arguments.finetune:
            raise ConfigError(f"{source}: is no config (.yaml), and --step and --finetune are for one; leave them out")
        raw_samples(_config_of_data([source, *more], keys), arguments.images).draw(out)
        print(out)
        return DONE
    if more:
        raise ConfigError(f"{more[0]}: a config stands alone; name its data by data.train='...'")
    if arguments.finetune:
        from vitscale.run.finetune import Finetune, complete

        job = Finetune(load_config(source, keys, complete), arguments.world)
        job.prepare()
        config = job.config
    else:
        config = load_config(source, keys)
    images_of_step(config, arguments.step or 1, arguments.images, arguments.world).draw(out)
    print(out)
    return DONE


def _simulate(arguments: argparse.Namespace) -> int:
    from vitscale.config.load import load_config
    from vitscale.data.index import ShardIndex, store_of
    from vitscale.run.simulate import simulate
    from vitscale.run.training_data import training_index
    from vitscale.run_folder import RunFolder

    config = load_config(arguments.config, arguments.overrides)
    store = store_of(config.data)
    if config.data.index is not None:  # all of its rows, whether or not their shards are there
        index = ShardIndex.load(config.data.index, store)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            index = training_index(config, RunFolder(Path(scratch)), store)
    print(simulate(config, index, arguments.nodes, arguments.gpus, arguments.steps))
    return DONE


def _replay(arguments: argparse.Namespace) -> int:
    from vitscale.run.replay import replay

    print(replay(Path(arguments.run), arguments.step, arguments.world, arguments.taken_back))
    return DONE


def _split(words: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """What of a command line's words names data, one at least, and which are keys: argparse has put them together."""
    data = [word for word in words if not _KEY.match(word)]
    if not data:
        raise ConfigError(f"{words[0]}: is a key, and no data are named; name shards or a folder of images before it")
    return data, [*(word for word in words if _KEY.match(word)), *overrides]


def _config_of_data(data: list[str], overrides: list[str]) -> RunConfig:
    """The defaults, for the data that the command line names."""
    from vitscale.config.load import config_of
    from vitscale.config.schema import Source

    return config_of({"data.train": tuple(Source(os.path.expanduser(each)) for each in data)}, overrides)
