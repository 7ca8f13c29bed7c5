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


# Private modules that tests outside src/ look into, each with the reason why no public name would do.
PRIVATE = {
    (
        "test_check.py",
        "diagnostics.function.advice",
    ): "the number of orthogonal directions in closed form, at any d",
    ("test_check_distribution.py", "diagnostics.distribution.limits"): "Student's quantile against printed tables",
    ("test_contracts.py", "evaluators.task.answer"): "an evaluator that makes values up, which no engine does",
    ("test_directions.py", "evaluators.base"): "the chunk on a device that is not there",
    ("test_gpu.py", "evaluators.base"): "the chunk follows free memory; the numbers are the same at any chunk",
    ("test_low_rank.py", "distributions.factored"): "layers that form no dense matrix, which no number shows",
    ("test_overlay.py", "optim.overlay"): "parameters swapped while `fn` runs: each way to read them, by itself",
    ("test_pool.py", "evaluators.task.answer"): "a worker of another torch, or of other points, as if elsewhere",
    ("test_pool.py", "evaluators.workers.shipping"): "bytes sent, and the pickler as if cloudpickle were not installed",
    ("test_second_derivatives.py", "estimate.second_order"): "the baseline of dependent directions at chosen values",
    ("test_unrolled.py", "unrolled.particles"): "the points of a window by themselves, pickled",
}


def is_public(module):
    """Return whether a module is a door: it says what it offers, or it is the folder of such modules."""
    return module == "" or (
        any(name == module or name.startswith(f"{module}.") for name in DOORS if name)
        and not any(part.startswith("_") for part in module.split("."))
    )


DOORS = {m for m, path in MODULES.items() if re.search("^__all__ =", path.read_text(encoding="utf-8"), re.MULTILINE)}


def looks_into(text):
    """The private modules that a script outside src/ imports, or names with dots or in a string."""
    tree = ast.parse(text)
    named = {name for name in imports_of(".outside", text) if name.startswith("zograd.")}
    named |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    for name in named:
        parts = name.split(".")
        if parts[0] == "zograd":
            found = [m for k in range(2, len(parts) + 1) if (m := ".".join(parts[1:k])) in MODULES]
            if found and not is_public(found[-1]) and not found[-1].startswith("_base"):
                yield found[-1]


def test_scripts_and_tests_look_at_public_names_only():
    """Or at ``_base``, or for a reason that is written down."""
    seen = set()
    for folder in ("benchmarks", "chaos", "examples", "tests", "docs", ".ci"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                text = path.read_text(encoding="utf-8")
                seen |= {(path.relative_to(ROOT / folder).as_posix(), module) for module in looks_into(text)}
    assert seen == PRIVATE.keys()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from zograd.estimate.statistics import spread", ["estimate.statistics"]),
        ("from zograd.estimate import statistics", ["estimate.statistics"]),
        ("import zograd.estimate.statistics", ["estimate.statistics"]),
        ("from zograd.distributions import hadamard", ["distributions.hadamard"]),
        ("from zograd.distributions.hadamard import Hadamard", ["distributions.hadamard"]),
        ("x = zograd.optim.overlay.Overlay", ["optim.overlay"]),
        ("patch('zograd.optim.overlay.cores')", ["optim.overlay"]),
        ("from zograd.distributions import Hadamard", []),
        ("from zograd import nn, zero_order", []),
        ("import zograd.contrib.rl, zograd.compat.torchopt as t", []),
        ("from zograd._base.trees import Space", []),
        ("zograd.optim.MeZO", []),
        ("zograd.zero_order", []),
    ],
)
def test_a_look_into_the_house_is_seen_in_every_form(text, found):
    assert sorted(set(looks_into(text))) == found


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


# Names of ours that a reader would have to learn, in place of the field's words.
CONCEPTS = {
    "anew",
    "crew",
    "dear",
    "errand",
    "evidence",
    "habit",
    "ledger",
    "luck",
    "page",
    "parcel",
    "reach",
    "refusal",
    "room",
    "tally",
    "twin",
}


def names_in(text):
    """Every name that a module makes or uses."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.arg, ast.keyword)):
            yield node.arg or ""
        elif isinstance(node, ast.alias):
            yield from (node.asname or "", *node.name.split("."))


def concepts_in(name):
    """The words of a name that are such concepts, in the singular."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return {w for word in words for w in (word, word.removesuffix("s")) if w in CONCEPTS}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m or "zograd")
def test_names_are_the_fields_words(module):
    asks = module == "_base.reach" or "_base.reach" in ours(module)  # the file of that name, and who asks it
    allowed = {"reach"} if asks else set()
    found = {*names_in(MODULES[module].read_text(encoding="utf-8")), *module.split(".")}
    assert {name for name in found if concepts_in(name) - allowed} == set()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("_twins", {"twin"}),
        ("ROOM", {"room"}),
        ("keepsLuck", {"luck"}),
        ("RoomOf", {"room"}),
        ("reach", {"reach"}),
        ("reached", set()),
        ("homepage", set()),
        ("num_samples", set()),
    ],
)
def test_a_concept_is_found_in_a_name(name, words):
    assert concepts_in(name) == words
