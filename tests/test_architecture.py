"""The walls between the rooms, kept from the code's own imports (see ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import vitscale

Column = tuple[set[str], ...]
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vitscale"

# Two columns on common ground. Each room may import those on the lines above it in its own column, and all of the
# common ground; rooms on one line never import each other. The top may import everything above it.
COMMON: Column = (
    {"errors", "text"}, {"faults", "heartbeat", "lease"}, {"world", "rng", "run_folder"}, {"files"}, {"config"},
)  # fmt: skip
TRAINING: Column = (
    {"data", "augment", "models", "checkpoint", "tracking"}, {"prepare"}, {"engine", "launch"}, {"evaluation"},
    {"planning"}, {"run"},
)  # fmt: skip
SERVING: Column = ({"interop"}, {"inference", "conversion"}, {"inspection", "export"})
TOP: Column = ({"bench"}, {"cli"}, {"__main__"})
# Between the columns: serving reads models; run and evaluation open and write model folders; the methods of
# models/pretrained_mixin.py, which are transformers' calls on the model classes, call what answers them.
ACROSS = {
    **{room: {"models"} for rooms in SERVING for room in rooms},
    "run": {"interop"},
    "evaluation": {"interop"},
}
INSIDE_FUNCTIONS = {"models.pretrained_mixin": {"interop"}}
# Nowhere in these is torch imported, not even inside a function.
WITHOUT_TORCH = (
    "errors",
    "world",
    "run_folder",
    "text",
    "files",
    "config",
    "data",
    "prepare",
    "checkpoint",
    "tracking",
    "launch",
)
# Importing these imports nothing heavy; a function may, when it runs.
COMMANDS = (
    "conversion.command",
    "inference.command",
    "inspection.command",
    "export.command",
    "run.command",
    "run.checkpoint_command",
    "planning.command",
)
LIGHT = (*WITHOUT_TORCH, *COMMANDS, "rng", "cli", "")
HEAVY = ("torch", "deepspeed", "accelerate", "mlflow", "transformers", "sklearn", "matplotlib")
ONLY_IN = {
    "accelerate": ("engine.backend",),
    "deepspeed": ("engine.backend",),
    "mlflow": ("tracking.tracker", "tracking.models"),
    "transformers": ("bench.peers",),  # others by name, where they are installed
    "onnx": ("export",),
    "onnxruntime": ("export",),
    "torchao": ("export.torch_export",),
    # Between a rank and its own reader process; the name of the error with which torch refuses a pickle.
    "pickle": ("data.wire", "interop.weight_files"),
}
MOST_CIRCLES, MOST_IN_A_CIRCLE = 1, 12  # of modules that import each other, however late
ENVIRONMENT = ("world", "launch")
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60  # fewer than these
# Distributions whose module has another name.
MODULE_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "nvidia-nvimgcodec-cu12": "nvidia",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}


@dataclass(frozen=True)
class Import:
    """One import of a module: what, where, and whether it runs when the module is imported."""

    name: str
    by: str
    line: int
    at_top: bool


def _module(path: Path) -> str:
    """'data.order' for vitscale/data/order.py; '' for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _trees() -> dict[str, ast.Module]:
    return {_module(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(node: ast.AST, at_top: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if not _type_checking(child):
            yield child, at_top
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _walk(child, at_top and not inside)


@cache
def _imports() -> tuple[Import, ...]:
    found = []
    for module, tree in _trees().items():
        for node, at_top in _walk(tree, True):
            if isinstance(node, ast.Import):
                found += [Import(alias.name, module, node.lineno, at_top) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}:{node.lineno}: import by full path"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [_home(alias.name) or f"vitscale.{alias.name}" if node.module == "vitscale" else name
                         for alias, name in zip(node.names, names, strict=True)]  # fmt: skip
                found += [Import(name, module, node.lineno, at_top) for name in names]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vitscale":
                found += [Import(home, module, node.lineno, at_top) for home in [_home(node.attr)] if home]
    return tuple(found)


def _home(name: str) -> str | None:
    """Where a public name of the package lies, which importing it or `vitscale.NAME` imports."""
    return f"{vitscale._PUBLIC[name]}.{name}" if name in vitscale._PUBLIC else None


def _room(module: str) -> str:
    return module.split(".")[0]


def _in(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or (room and module.startswith(f"{room}.")) for room in rooms)


def test_the_parser_of_this_test_sees_the_imports() -> None:
    assert len(_trees()) > 30
    assert any(found.name.startswith("vitscale.errors") for found in _imports())
    assert any(not found.at_top for found in _imports())


def test_every_room_has_its_place_and_every_place_its_room() -> None:
    placed = set().union(*COMMON, *TRAINING, *SERVING, *TOP)
    assert {_room(module) for module in _trees() if module} == placed


def _allowed() -> dict[str, set[str]]:
    """The rooms that each room may import."""
    allowed: dict[str, set[str]] = {}
    ground = set().union(*COMMON)
    for column, below in ((COMMON, set()), (TRAINING, ground), (SERVING, ground)):
        for rooms in column:
            allowed |= {room: below | ACROSS.get(room, set()) for room in rooms}
            below = below | rooms
    everything = set(allowed)
    for rooms in TOP:
        allowed |= dict.fromkeys(rooms, everything)
        everything = everything | rooms
    return allowed


def test_rooms_import_only_what_they_may() -> None:
    allowed, broken = _allowed(), []
    for found in _imports():
        if not found.name.startswith("vitscale.") or not found.by:  # the package hands out public names, lazily
            continue
        own, other = _room(found.by), _room(found.name.removeprefix("vitscale."))
        if other in INSIDE_FUNCTIONS.get(found.by, ()) and not found.at_top:
            continue
        if other in allowed and own != other and other not in allowed[own]:
            broken.append(f"vitscale/{found.by}:{found.line} imports {found.name}")
    assert not broken


def _reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """The modules that `start` imports, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def test_circles_of_imports_are_few_and_small() -> None:
    """Of all imports, those inside functions and for type checkers too."""
    edges: dict[str, set[str]] = {}
    for module, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitscale."):
                names = [f"{node.module}.{alias.name}".removeprefix("vitscale.") for alias in node.names]
                edges.setdefault(module, set()).update(
                    name if name in _trees() else name.rpartition(".")[0] for name in names
                )
    reached = {module: _reached(module, edges) for module in edges}
    circles = {
        frozenset({other for other in reached[module] if module in reached.get(other, ())})
        for module in edges
        if module in reached[module]
    }
    assert len(circles) <= MOST_CIRCLES, circles
    assert all(len(circle) <= MOST_IN_A_CIRCLE for circle in circles), circles


@pytest.mark.parametrize("package", ONLY_IN)
def test_one_place_for_a_library(package: str) -> None:
    broken = [
        f"vitscale/{found.by}:{found.line} imports {found.name}"
        for found in _imports()
        if _room(found.name) == package and not _in(found.by, ONLY_IN[package])
    ]
    assert not broken


def test_torch_stays_out_of_the_light_rooms() -> None:
    broken = [
        f"vitscale/{found.by}:{found.line} imports {found.name}"
        for found in _imports()
        if (_in(found.by, WITHOUT_TORCH) and _room(found.name) == "torch")
        or (_in(found.by, LIGHT) and found.at_top and _room(found.name) in HEAVY)
    ]
    assert not broken


def test_importing_the_light_rooms_imports_nothing_heavy() -> None:
    """Also by way of others: what the reader process and `vitscale --help` import."""
    light = [f"vitscale.{name}".rstrip(".") for name in _trees() if _in(name, LIGHT)]
    assert {"vitscale.cli", "vitscale.data.reader", "vitscale.launch.torchrun"} <= set(light)
    code = f"""
import importlib, sys
for name in {light}:
    importlib.import_module(name)
    heavy = [heavy for heavy in {HEAVY} if heavy in sys.modules]
    if heavy:
        sys.exit(f"{{name}} imports {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_environment_is_read_in_two_places() -> None:
    broken = []
    for module, tree in _trees().items():
        for node in ast.walk(tree):
            touched = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
            if touched and not _in(module, ENVIRONMENT):
                broken.append(f"vitscale/{module}:{node.lineno}")
    assert not broken


def test_packages_re_export_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert path.parent == PACKAGE or not path.read_text(encoding="utf-8").strip(), path


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(item for extra in extras.values() for item in extra)]
    names = {match.group() for item in wanted if (match := re.match(r"[\w-]+", item))}
    declared = {MODULE_NAMES.get(name, name) for name in names} | {"vitscale"} | set(sys.stdlib_module_names)
    broken = [
        f"vitscale/{found.by}:{found.line} imports {found.name}"
        for found in _imports()
        if _room(found.name) not in declared
    ]
    assert not broken


def test_files_are_short() -> None:
    lengths = {_module(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length >= LINES_OF_A_FILE} == {}


def test_functions_are_short() -> None:
    broken = {}
    for module, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name, length = f"{module}.{node.name}", (node.end_lineno or 0) - node.lineno + 1
                if length >= LINES_OF_A_FUNCTION:
                    broken[name] = length
    assert broken == {}


def _map() -> dict[str, list[str]]:
    """The rooms of ARCHITECTURE.md's table, as its first column names them, each with the files that its row names."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("| room |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {
        name: re.findall(r"\b\w+\.py\b", row[1]) for row in rows for name in row[0].replace(" ", "").split(",") if name
    }


def test_the_map_names_the_rooms_and_files_that_are_there() -> None:
    rooms = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    assert set(_map()) == rooms
    missing = [
        f"{room}{name}" for room, names in _map().items() for name in names if not (PACKAGE / room / name).exists()
    ]
    assert not missing
