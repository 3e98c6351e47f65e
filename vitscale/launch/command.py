"""The verbs `submit` and `chaos`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from vitscale.run_folder import DONE
from vitscale.text import above_zero


def register(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs."""
    added = verb("submit", _submit, "look at a config for so many GPUs, then give it to Slurm")
    added.add_argument("config", metavar="CONFIG.yaml")
    added.add_argument("overrides", metavar="dotted.key=value", nargs="*", help="say data.train='/shards/*.tar'")
    added.add_argument("--nodes", type=above_zero, required=True, metavar="N")
    added.add_argument("--gpus-a-node", type=above_zero, default=8, metavar="N", help="(default: 8)")
    text = "of sbatch, say --option=--partition=gpu; several times"
    added.add_argument("--option", action="append", default=[], metavar="OPTION", help=text)
    added.add_argument("--dry-run", action="store_true", help="print the command instead")

    added = verb("chaos", _chaos, "break runs on purpose and see whether they end as an unbroken one does")
    added.add_argument("--trials", type=above_zero, metavar="N", help="of all kinds in turns (default: one each)")
    text = "then go on with those that kill at any moment until there are so many kills (default: none)"
    added.add_argument("--kills", type=int, default=0, metavar="N", help=text)
    added.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (default: 0)")
    added.add_argument("--kinds", nargs="+", metavar="KIND", help="of faults, say 'rank killed' (default: all)")
    added.add_argument("--out", type=Path, metavar="FOLDER", help="for runs and logs, which are kept (default: none)")
    added.add_argument("--json", type=Path, metavar="FILE", help="what the trials came to, for programs")


def _submit(arguments: argparse.Namespace) -> int:
    from vitscale.launch.submit import submit

    config, options = Path(arguments.config), arguments.option
    print(submit(config, arguments.overrides, arguments.nodes, arguments.gpus_a_node, options, arguments.dry_run))
    return DONE


def _chaos(arguments: argparse.Namespace) -> int:
    from vitscale.launch.chaos import run_trials

    kinds, trials, kills = arguments.kinds, arguments.trials, arguments.kills
    return run_trials(kinds, trials, kills, arguments.seed, arguments.out, arguments.json)
