"""`python -m vitscale.bench.gpu_suite OUT`, as launch/gpu_suite.sh starts it: what needs a GPU, proved and measured."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vitscale import world
from vitscale.bench.gpu_suite.cases import Stage, import_libraries
from vitscale.bench.gpu_suite.results import SETTLED, Results
from vitscale.bench.gpu_suite.runner import Runner
from vitscale.errors import VitscaleError
from vitscale.run_folder import BAD_INPUT, DONE, FAILED

_HERE = "vitscale.bench.gpu_suite"
FEW_LABELS = "i"  # needs images that are not part of the repository
# In order of worth. The limits are a GPU machine's, within the usual budget; compiling takes most of them.
STAGES = (
    Stage("a", "the device and its rates", f"{_HERE}.device:cases", 60, 30, 10),
    Stage("b", "gradients, ZeRO, resume", f"{_HERE}.correctness:cases", 200, 110, 30),
    Stage("c", "pretraining from JPEGs", f"{_HERE}.pretraining:cases", 300, 150, 60),
    Stage("d", "the step beside its peers", f"{_HERE}.steps:cases", 400, 300, 60),
    Stage("e", "stop and resume, bit for bit", f"{_HERE}.correctness:resume_cases", 200, 90, 40),
    Stage("f", "augmentation on the device", f"{_HERE}.augmentation:cases", 60, 45, 20),
    Stage("g", "a profile of five steps", f"{_HERE}.profiling:cases", 120, 110, 40),
    Stage("h", "the rest of pytest -m gpu", f"{_HERE}.gpu_tests:cases", 400, 390, 60),
    Stage("j", "saves beside the steps", f"{_HERE}.saving:cases", 200, 180, 60),
    Stage("k", "sharding: memory and speed by stage", f"{_HERE}.sharding:cases", 480, 120, 60),
    Stage(FEW_LABELS, "few labels of CIFAR-10", f"{_HERE}.few_labels:cases", 600, 360, 120),
)


def main(arguments: Sequence[str]) -> int:
    """Run what is left; DONE where each stage has passed or cannot run here."""
    letters = [stage.letter for stage in STAGES]
    parser = argparse.ArgumentParser(prog="launch/gpu_suite.sh", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the results; with some in it, the rest is run")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True, help="cpu: all at tiny sizes")
    parser.add_argument("--stages", default=None, help="letters, with commas")
    parser.add_argument("--images", type=Path, default=None, help="folder of CIFAR-10's shards, for stage i")
    parser.add_argument("--budget", type=float, required=True, help="seconds for all")
    options = parser.parse_args(arguments)
    if options.images is None:
        letters.remove(FEW_LABELS)
    chosen = letters if options.stages is None else [letter for letter in options.stages.split(",") if letter]
    try:
        if not chosen or not set(chosen) <= set(letters):
            raise VitscaleError(
                f"STAGES={options.stages!r}: must be of {','.join(letters)}, with commas"
                + ("" if options.images else f"; {FEW_LABELS} needs CIFAR10=FOLDER with its shards")
            )
        if options.device == "cuda" and world.local_device() == "cpu":
            raise VitscaleError("DEVICE=cuda: runs would take the CPU: there is neither /dev/nvidiactl nor /dev/dxg, "
                                "or CUDA_VISIBLE_DEVICES hides the GPU")  # fmt: skip
        results = Results(options.out.resolve(), options.device, STAGES)
    except VitscaleError as error:
        print(f"launch/gpu_suite.sh: error: {error}", file=sys.stderr)
        return BAD_INPUT
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))  # by way of what ends the stage's processes
    with tempfile.TemporaryDirectory(prefix="vitscale-gpu-suite-", ignore_cleanup_errors=True) as scratch:
        runner = Runner(results, options.device, Path(scratch), options.budget, options.images)
        if options.device == "cpu" and results.in_order(chosen):
            world.enter()
            importlib.import_module("vitscale.bench.peers").import_transformers()
            import_libraries()
        runner.run(chosen)
    print(f"\n{results.summary()}\nresults: {results.out}")
    return DONE if all(results.state(letter) in SETTLED for letter in chosen) else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
