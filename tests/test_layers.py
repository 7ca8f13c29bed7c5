"""The floors of the package: a module imports only what lies below it, and there are no cycles."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "zograd"

# The eight floors, from the ground up: a folder or a module of the root may import lower floors only. Inside a folder
# modules may stand on each other, three high at most.
FLOORS = [
    ["errors", "schemes"],
    ["_base"],
    ["distributions", "failures", "sampling", "shaping", "tracking"],
    ["evaluators"],
    ["estimate"],
    ["func", "optim"],
    ["diagnostics", "nn", "unrolled"],
    ["", "compat", "contrib"],  # "" is zograd itself
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
HEIGHT = 3  # of the modules inside a folder, one inside it counting as one
HIGHER = {"diagnostics": 6}  # still to be rebuilt


def name_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def room_of(module):
    """The folder that a module stands in, or the module itself at the root."""
    while module not in FLOOR:
        module = module.rpartition(".")[0]
        assert module, "place it in FLOORS"
    return module


def imports_of(module, text=None):
    """The modules that a module imports, anywhere in it: at the top, in a function, or for types only."""
    path = MODULES.get(module, SOURCE / "x.py")
    package = path.parent.relative_to(SOURCE).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["zograd", *package][: len(package) + 2 - node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                # `from zograd.distributions import gaussian` is the module, `... import Gaussian` the package.
                inner = f"{source}.{alias.name}".removeprefix("zograd").lstrip(".")
                yield f"zograd.{inner}" if source.split(".")[0] == "zograd" and inner in MODULES else source


def ours(module, text=None):
    names = {name for name in imports_of(module, text) if name == "zograd" or name.startswith("zograd.")}
    return {name.removeprefix("zograd").removeprefix(".") for name in names}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m or "zograd")
def test_a_module_stands_on_one_of_eight_floors(module):
    assert len(FLOORS) == 8
    assert FLOOR[room_of(module) if module else ""]


def test_nothing_private_stands_at_the_root_but_the_ground():
    private = [path.name for path in SOURCE.iterdir() if path.name.startswith("_") and path.name != "__pycache__"]
    assert sorted(private) == ["__init__.py", "_base"]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m or "zograd")
def test_a_module_imports_lower_floors_only(module):
    room = room_of(module) if module else ""
    for imported in ours(module):
        assert imported in MODULES, f"{module} imports zograd.{imported}, which does not exist"
        other = room_of(imported) if imported else ""
        inside = other == room and room in FOLDERS
        if not (inside or FLOOR[other] < FLOOR[room] or module == ""):
            pytest.fail(f"zograd.{module} (floor {FLOOR[room]}) imports zograd.{imported} (floor {FLOOR[other]})")


def height_of(folder):
    """The longest chain of imports among what stands in a folder, its door left out."""

    def within(module):
        """The module or folder of this folder that a module is, or is in."""
        rest = module.removeprefix(f"{folder}.")
        return "" if rest == module else rest.partition(".")[0]

    graph = {within(m): set() for m in MODULES if within(m)}
    for module in filter(within, MODULES):
        graph[within(module)] |= {within(i) for i in ours(module)} - {"", within(module)}
    heights = {}
    for node in TopologicalSorter(graph).static_order():
        heights[node] = 1 + max((heights[below] for below in graph[node]), default=0)
    return max(heights.values()), heights


FOLDERS = sorted({path.parent.relative_to(SOURCE).as_posix().replace("/", ".") for path in MODULES.values()} - {"."})


@pytest.mark.parametrize("folder", [f for f in FOLDERS if not f.startswith("compat")])
def test_a_folder_is_three_floors_high_at_most(folder):
    height, heights = height_of(folder)
    assert height <= HEIGHT, f"{folder}: {heights}"


def test_there_are_no_cycles():
    # What runs on import only: the package's own __init__ runs first whatever is imported.
    graph = {module: ours(module) - {module} for module in MODULES if module}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_the_front_door_is_imported_by_nothing():
    for module in MODULES:
        assert module == "" or "" not in ours(module), module


def test_only_the_tree_module_imports_optree():
    users = [m for m in MODULES if any(name.split(".")[0] == "optree" for name in imports_of(m))]
    assert users == ["_base.trees"]


def test_the_package_imports_torch_and_little_else():
    allowed = {"torch", "optree", "tqdm", "zograd"}
    for module in MODULES:
        for name in imports_of(module):
            top = name.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, f"zograd.{module} imports {name}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import zograd.nn", {"nn"}),
        ("import zograd.nn as z, os", {"nn"}),
        ("from zograd import nn", {"nn"}),
        ("from zograd import zero_order", {""}),
        ("from zograd.distributions import Gaussian", {"distributions"}),
        ("from zograd.distributions.gaussian import Gaussian", {"distributions.gaussian"}),
        ("def f():\n    from zograd.estimate.estimate import estimate", {"estimate.estimate"}),
        ("if TYPE_CHECKING:\n    from zograd.nn import ZeroOrder", {"nn"}),
        ("from . import nn", {"nn"}),
        ("from .schemes import NAIVE", {"schemes"}),
        ("import torch", set()),
    ],
)
def test_the_walk_sees_every_form_of_import(text, found):
    assert ours("x", text) == found


def _texts():
    for folder in ("src", "tests", "examples", "docs", "benchmarks", "chaos", ".ci", ".github"):
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(ROOT / folder).parts)
            if (
                not hidden
                and path.is_file()
                and path.suffix
                in {
                    ".py",
                    ".md",
                    ".rst",
                    ".toml",
                    ".yml",
                    ".yaml",
                    ".txt",
                    ".ipynb",
                    ".json",
                    "",
                }
            ):
                yield path
    yield from sorted(ROOT.glob("*.md"))
    yield from sorted(ROOT.glob("*.toml"))


# Built from parts, so that this file does not match itself.
_OUTSIDE = re.compile(
    "|".join([r"\.\." + "/shared", "/" + r"work/(main|shared)", r"(?<![\w.])/(home|Users|root)" + r"/\w"])
)


def test_nothing_refers_to_a_place_outside_the_repository():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip():.80}"
        for path in _texts()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if _OUTSIDE.search(line)
    ]
    assert not found, "\n".join(found)
