"""Lets transformers and timm be imported beside a torchvision whose C++ operators do not load.

On a machine without CUDA's libraries torchvision's wheel has only its Python part, and stops at
the first operator that is not there. Declared by name, never called, they are enough to import it.
`python -m tests.torchvision_ops VERB ...` is `vitscale VERB ...` with them declared.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

_NAMES = re.compile(r"torchvision::(\w+)|register_meta\(\"(\w+)\"")


class DeclareOperators(MetaPathFinder):
    """Waits for the first import of torchvision and declares its operators just before."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            found = importlib.util.find_spec("torchvision")
            if found is not None and found.submodule_search_locations:
                _declare(Path(next(iter(found.submodule_search_locations))))
        return None


def _declare(package: Path) -> None:
    import torch

    try:
        for library in package.glob("_C*.so"):
            torch.ops.load_library(str(library))
        return
    except OSError:
        found = {a or b for file in package.rglob("*.py") for a, b in _NAMES.findall(file.read_text(encoding="utf-8"))}
    for name in sorted(found):
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


if __name__ == "__main__":
    sys.meta_path.insert(0, DeclareOperators())
    from vitscale.cli import main

    sys.exit(main(sys.argv[1:]))
