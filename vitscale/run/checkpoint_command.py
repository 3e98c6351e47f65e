"""The verb `checkpoint`: what a run has saved, looked at and cleared up, and DeepSpeed's own checkpoints read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from vitscale.run_folder import BAD_INPUT, DONE
from vitscale.text import above_zero, printable


def register(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb."""
    verbs = verb("checkpoint", _list, "what a run has saved: ls, verify, diff, rm; import-deepspeed").add_subparsers(
        metavar="WHAT", required=True
    )

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run_verb=run, parser=added)
        return added

    add("ls", _list, "the checkpoints of a run, and why each is kept").add_argument("run", metavar="RUN_FOLDER")
    added = add("verify", _verify, "read every byte and compare with what was written; exit code 2 where one differs")
    added.add_argument("path", metavar="RUN|CHECKPOINT")
    added = add("diff", _diff, "where two checkpoints differ: tensors, state, config")
    for name in ("first", "second"):
        added.add_argument(name, metavar="RUN|CHECKPOINT", help="of a run the newest")
    added = add("rm", _remove, "delete checkpoints of a run")
    added.add_argument("run", metavar="RUN_FOLDER")
    added.add_argument("steps", metavar="STEP", nargs="+", type=above_zero)
    added.add_argument("--force", action="store_true", help="also the last one that is whole")
    added = add("import-deepspeed", _import, "the fp32 weights of what DeepSpeed's save_checkpoint wrote (ZeRO 1 to 3)")
    added.add_argument("folder", metavar="FOLDER")
    added.add_argument("--out", required=True, metavar="FOLDER", help="a new folder for model.safetensors")


def _list(arguments: argparse.Namespace) -> int:
    from vitscale.run.checkpoints import as_table

    print(as_table(Path(arguments.run)))
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from vitscale.run.checkpoints import verify

    good = True
    for folder, faults in verify(Path(arguments.path)):
        good &= not faults
        print(printable(f"{folder}: {'; '.join(faults) or 'whole'}"), flush=True)
    return DONE if good else BAD_INPUT


def _diff(arguments: argparse.Namespace) -> int:
    from vitscale.run.checkpoints import differences

    for line in differences(Path(arguments.first), Path(arguments.second)):
        print(line, flush=True)
    return DONE


def _remove(arguments: argparse.Namespace) -> int:
    from vitscale.run.checkpoints import remove_steps

    for folder in remove_steps(Path(arguments.run), arguments.steps, arguments.force):
        print(f"{folder}: deleted")
    return DONE


def _import(arguments: argparse.Namespace) -> int:
    from vitscale.run.checkpoints import import_deepspeed

    print(import_deepspeed(Path(arguments.folder), Path(arguments.out)))
    return DONE
