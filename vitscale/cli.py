"""The command line: `vitscale VERB ...`. An error is one line and an exit code.

Exit codes: 0 done, 2 bad config or input, 3 to be started again (stopped on request with a checkpoint, or by the
infrastructure), 130 ended by Ctrl-C, 1 anything else.
Verbs import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vitscale import __version__, world
from vitscale.conversion import command as conversion
from vitscale.errors import VitscaleError
from vitscale.export import command as export
from vitscale.inference import command as inference
from vitscale.inspection import command as inspection
from vitscale.launch import command as launching
from vitscale.lease import is_announced
from vitscale.planning import command as planning
from vitscale.run import checkpoint_command as checkpoints
from vitscale.run import command as looking
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, INTERRUPTED, STOPPED, RunFolder, exit_code
from vitscale.text import did_you_mean, ignore_warnings_of_pillow, nowhere, redact, to_stderr, tolerate_any_text

if TYPE_CHECKING:
    from vitscale.config.schema import RunConfig

_SAVE_PATIENCE_S = 600.0  # of `vitscale save`


def _pretrain(arguments: argparse.Namespace) -> int:
    from vitscale.run.pretrain import pretrain

    return _to_launcher(pretrain(_config(arguments), arguments.world), arguments.world)


def _finetune(arguments: argparse.Namespace) -> int:
    from vitscale.config.load import load_config
    from vitscale.run.finetune import complete, finetune

    code = finetune(load_config(arguments.config, arguments.overrides, complete), arguments.world)
    return _to_launcher(code, arguments.world)


def _doctor(arguments: argparse.Namespace) -> int:
    from vitscale.run.doctor import doctor

    here = arguments.world
    code = doctor(_config(arguments), here, packs=arguments.finetune)
    return DONE if here.supervised and here.world_size > 1 else code  # the launcher reads what it says


def _to_launcher(code: int, here: world.World) -> int:
    """torchrun takes every code but 0 for a failure and says so in forty lines; the launcher reads exit.json."""
    return DONE if code == STOPPED and here.supervised and here.world_size > 1 else code


def _print_config(arguments: argparse.Namespace) -> int:
    from vitscale.config.check import check_config
    from vitscale.config.load import dump_config

    config = _config(arguments)
    check_config(config, world.World(world_size=arguments.ranks))
    sys.stdout.write(dump_config(config))
    return DONE


def _pack(arguments: argparse.Namespace) -> int:
    from vitscale.files.classes import read_names
    from vitscale.prepare.pack import pack
    from vitscale.prepare.sources import Columns

    pack(
        arguments.source,
        Path(arguments.out).expanduser(),
        shard_samples=arguments.shard_samples,
        held_out=arguments.held_out,
        workers=arguments.workers,
        seed=arguments.seed,
        classes=None if arguments.classes is None else read_names(Path(arguments.classes)),
        short_side=arguments.resize,
        columns=Columns(arguments.image_column, tuple(arguments.label_column)),
    )
    return DONE


def _index(arguments: argparse.Namespace) -> int:
    from vitscale.config.data import Data
    from vitscale.data.indexing import differences, make_index

    label = Data(label=arguments.label).label_extension
    kinds: dict[str, Any] = {"label": label, "image": arguments.image, "workers": arguments.workers}
    if arguments.check is None:
        if not arguments.patterns or arguments.out is None:
            arguments.parser.error("name shards and --out index.json, or --check index.json")
        print(make_index(arguments.patterns, Path(arguments.out).expanduser(), part=arguments.part, **kinds))
        return DONE
    if arguments.patterns or arguments.out or arguments.part:
        arguments.parser.error("--check index.json stands without shards, --out and --part: the index names its shards")
    count, found = differences(arguments.check, **kinds)
    print(*found, f"{arguments.check}: {len(found)} of {count} shards differ", sep="\n")
    return BAD_INPUT if found else DONE


def _part(text: str) -> tuple[int, int]:
    """I/N, the I-th of N parts."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: must be I/N with I from 1 to N, say 3/8")
    return int(found[1]), int(found[2])


def _evaluate(arguments: argparse.Namespace) -> int:
    from vitscale.config.load import load_config
    from vitscale.run.evaluate import as_table, evaluate, saved_scores
    from vitscale.tracking.tracker import sync

    out = None if arguments.out is None else Path(arguments.out)
    if arguments.show:
        print(as_table(saved_scores(RunFolder(out or Path(arguments.source)))))
        return DONE
    results = evaluate(arguments.source, arguments.world, arguments.overrides, out, arguments.take)
    if arguments.world.is_main:
        print(as_table(saved_scores(results)))
        if results.config.exists() and (config := load_config(results.config)).tracking.mlflow:
            sync(results.path, config)
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from vitscale.run.report import report

    print(report(RunFolder(Path(arguments.run))))
    return DONE


def _stop(arguments: argparse.Namespace) -> int:
    folder = _run_folder(arguments)
    _require_running(folder, folder.stop)
    folder.stop.touch()
    print(f"{folder.stop}: the run saves a checkpoint and stops at its next step")
    return DONE


def _save(arguments: argparse.Namespace) -> int:
    from vitscale.checkpoint.store import checkpoint_folders

    def newest() -> list[tuple[Path, int]]:
        return [(path, path.stat().st_mtime_ns) for path in checkpoint_folders(folder.checkpoints)[:1]]

    folder = _run_folder(arguments)
    _require_running(folder, folder.save)
    before, deadline = newest(), time.monotonic() + _SAVE_PATIENCE_S
    folder.save.touch()
    # The run takes the file away once the checkpoint of a later step than now is there.
    while folder.save.exists() and folder.is_held(report=lambda line: None) and time.monotonic() < deadline:
        time.sleep(0.5)
    folder.save.unlink(missing_ok=True)
    if (after := newest()) == before:
        raise VitscaleError(
            f"{folder.path}: the run has ended, or has not saved within {_SAVE_PATIENCE_S:.0f} s (it does so at the "
            "end of a step, and of an evaluation); look at what it prints, then try again"
        )
    print(after[0][0])
    return DONE


def _require_running(folder: RunFolder, request: Path) -> None:
    """VitscaleError where no run would see this file."""
    if not folder.is_held():
        raise VitscaleError(f"{folder.path}: no run holds this folder, so there is nothing to {request.name}")


def _sync(arguments: argparse.Namespace) -> int:
    from vitscale.config.load import load_config
    from vitscale.tracking.tracker import sync

    folder = _run_folder(arguments)
    config = load_config(folder.config)
    return DONE if sync(folder.path, config) else 1


def _run_folder(arguments: argparse.Namespace) -> RunFolder:
    folder = RunFolder(Path(arguments.run))
    if not folder.config.exists() and not is_announced(folder.path):  # rank 0 writes it late
        raise VitscaleError(f"{arguments.run}: is no run folder (no config.yaml in it); name the folder RUN_DIR/NAME")
    return folder


def _export_run(source: Path, out: Path | None) -> Path:
    from vitscale.run.export import export_run

    return export_run(source, out)


def _sizes_of_encoder(written: dict[str, Any]) -> dict[str, Any]:
    from vitscale.run.finetune import sizes_of_encoder

    return sizes_of_encoder(written)


def _bench(arguments: argparse.Namespace) -> int:
    from vitscale.bench.all import run

    return run(arguments.what, arguments.rest)


def _config(arguments: argparse.Namespace) -> RunConfig:
    from vitscale.config.load import load_config

    if getattr(arguments, "finetune", False):
        from vitscale.run.finetune import complete

        return load_config(arguments.config, arguments.overrides, complete)
    return load_config(arguments.config, arguments.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vitscale", description="Pretrain Vision Transformers at scale.")
    parser.add_argument("--version", action="version", version=f"vitscale {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run_verb=run, parser=added)
        return added

    def takes_config(added: argparse.ArgumentParser) -> None:
        added.add_argument("config", metavar="CONFIG.yaml")
        added.add_argument("overrides", metavar="dotted.key=value", nargs="*", help="laid over the file")

    takes_config(verb("pretrain", _pretrain, "train, or go on where this run stopped"))
    text = "train a pretrained encoder on labels, or go on where this run stopped"
    takes_config(verb("finetune", _finetune, text))
    examined = verb("doctor", _doctor, "what would keep a run from starting, looked at here or on all ranks")
    takes_config(examined)
    shown = verb("config", _print_config, "print the resolved config")
    takes_config(shown)
    for added in (shown, examined):
        added.add_argument("--finetune", action="store_true", help="as `vitscale finetune` completes it")
    shown.add_argument("--ranks", type=inference.above_zero, metavar="N", default=1, help="to check for (default: 1)")
    added = verb("pack", _pack, "a folder, a list or a data set of images into WebDataset shards with an index")
    _takes_source(added)
    added = verb("index", _index, "count and hash shards into an index.json, or hold one against its shards")
    added.add_argument("patterns", nargs="*", metavar="PATTERN", help="shards: paths or URLs")
    added.add_argument("--out", metavar="index.json")
    added.add_argument("--part", type=_part, metavar="I/N", help="every N-th shard; the last of N calls joins them")
    added.add_argument("--check", metavar="index.json", help="read all again and say which shards differ; exit code 2")
    added.add_argument("--workers", type=inference.above_zero, metavar="N", help="processes (default: one a core)")
    added.add_argument("--label", default="cls", help="the extension of members with labels (default: cls)")
    added.add_argument("--image", help="the extension of members with images, where the run sets data.image")
    added = verb("evaluate", _evaluate, "score the features of a run or of any model on labelled images")
    added.add_argument("source", metavar="RUN|MODEL", help="a run's folder, a model's, a file of weights, a hub name")
    added.add_argument("overrides", metavar="dotted.key=value", nargs="*", help="say evaluation.test='held_out/*.tar'")
    added.add_argument("--out", metavar="FOLDER", help="for scores and figures (default: the run's own folder)")
    inference.takes_set(added)
    added.add_argument("--show", action="store_true", help="print the scores that are there, without work")
    for name, run, text in (
        ("report", _report, "what a run came to, as one report.html"),
        ("stop", _stop, "ask a run to save and stop"),
        ("save", _save, "ask a run to save and go on; waits for the checkpoint"),
        ("sync", _sync, "send what MLflow has missed"),
    ):
        verb(name, run, text).add_argument("run", metavar="RUN_FOLDER")
    looking.register(verb)
    planning.register(verb, _sizes_of_encoder)
    for module in (launching, checkpoints, conversion, inference, inspection):
        module.register(verb)
    export.register(verb, _export_run)
    added = verb("bench", _bench, "measure this project beside its peers")
    benches = "data augment step model checkpoint startup exchange guards zero host sharding all"
    added.add_argument("what", choices=benches.split())
    added.add_argument(
        "rest", nargs=argparse.REMAINDER, help="options of that benchmark (--help lists them); --json FILE"
    )
    return parser


def _takes_source(added: argparse.ArgumentParser) -> None:
    """The arguments of `pack`."""
    text = (
        "images in one folder a class, or flat; a list of paths (.csv, .tsv, .parquet); Parquet files with images; "
        "a folder of datasets' save_to_disk; shards ('FOLDER/*.tar')"
    )
    added.add_argument("source", metavar="SOURCE", help=text)
    added.add_argument("out", metavar="OUT", help="a new folder for the shards, or one that the same command began")
    added.add_argument("--shard-samples", type=int, default=5000, help="images a shard (default: 5000)")
    added.add_argument("--held-out", type=float, default=0.0, help="share of images for OUT/test (default: 0)")
    added.add_argument("--workers", type=inference.above_zero, default=None, help="processes (default: one a core)")
    added.add_argument("--seed", type=int, default=0, help="of the order and the split (default: 0)")
    added.add_argument("--classes", metavar="FILE", help="classes.json of other shards, whose labels these are to have")
    text = "make images smaller whose shorter side is longer; the others stay as they are"
    added.add_argument("--resize", type=inference.above_zero, metavar="PIXELS", help=text)
    added.add_argument("--image-column", metavar="NAME", help="of a list (default: told by names and types)")
    text = "likewise; several times: a number each, for several labels an image"
    added.add_argument("--label-column", metavar="NAME", action="append", default=[], help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the process's exit code."""
    tolerate_any_text()
    ignore_warnings_of_pillow()
    sys.excepthook = _print_traceback
    arguments, rest = _parser().parse_known_args(argv)
    if rest:  # argparse takes overrides only in one place; they may stand after options too
        if not hasattr(arguments, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            hint = _nearest(rest[0], arguments.parser, takes_keys=hasattr(arguments, "overrides"))
            arguments.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        arguments.overrides += rest
    here = world.World()
    try:
        on_ranks = arguments.run_verb in (_pretrain, _finetune, _evaluate, _doctor)
        on_ranks |= getattr(arguments, "what", None) == "sharding"  # of the benchmarks
        arguments.world = here = world.enter(on_ranks)
        with _stoppable() if arguments.run_verb in (_pretrain, _finetune) else contextlib.nullcontext():
            code = arguments.run_verb(arguments)
        sys.stdout.flush()
        return code
    except VitscaleError as error:
        # Before there is a run folder all ranks fail alike, and rank 0 speaks; after, the first to fail does.
        if not getattr(error, "reported", not here.is_main):
            to_stderr(redact(f"vitscale: error: {error}"))
        code = exit_code(error)
        if here.world_size > 1:  # at once: with a process group that was not left, Python's own end may abort (SIGABRT)
            sys.stdout.flush()
            os._exit(code)
        return code
    except BrokenPipeError as error:
        if error.errno != errno.EPIPE or arguments.run_verb in (_pretrain, _finetune):
            raise
        return DONE  # the reader of our output has seen enough
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or here.world_size > 1:
            raise
        to_stderr(
            f"vitscale: error: {error.filename or 'stdout'}: cannot be written: {error.strerror}; make room there"
        )
        sys.stdout = nowhere("w")  # what it still holds would fail once more at the end
        return FAILED
    except KeyboardInterrupt:
        print("vitscale: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Until a run listens itself, while it imports, say, TERM and USR1 end it as before its first step: at once, to be
    started again. What is ignored stays so: a launcher's ranks do not die of USR1."""
    heard = [each for each in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(each) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    for each in heard:
        signal.signal(each, lambda *_: os._exit(STOPPED))
    try:
        yield
    finally:
        for each in heard:
            signal.signal(each, signal.SIG_DFL)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own, without secrets that a library put into its words."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _nearest(option: str, parser: argparse.ArgumentParser, takes_keys: bool) -> str:
    near = "" if "." in option else did_you_mean(option.split("=")[0], re.findall(r"--[\w-]+", parser.format_usage()))
    as_key = f"; write {option.lstrip('-').partition('=')[0]}=VALUE"  # other tools have keys as options
    return near or (as_key if takes_keys and option.startswith("-") else "")


if __name__ == "__main__":
    sys.exit(main())
