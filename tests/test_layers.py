"""The import levels of the package: a module imports only what lies below it, and there are no cycles."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "zograd"

# Each row may import the rows above it and nothing else; a row within a level is a level of its own (2.1 above 2.0).
LEVELS = [
    ("L0", ["errors", "_versions"]),
    ("L1.0", ["sampling", "failures", "schemes", "shaping"]),
    ("L1.1", ["_digest", "_precision", "_tree", "_random", "_reuse", "_threads"]),
    ("L1.2", ["_factored"]),
    ("L2.0", ["distributions.base"]),
    ("L2.1", ["distributions.gaussian", "distributions.low_rank", "distributions.rademacher", "distributions.sphere"]),
    (
        "L2.2",
        [
            "distributions.adapter",
            "distributions.coordinate",
            "distributions.guided",
            "distributions.hadamard",
            "distributions.orthogonal",
            "distributions.sobol",
        ],
    ),
    ("L2.3", ["distributions"]),
    ("L3", ["_points", "_objective", "_overlay", "_replica"]),
    ("L4.0", ["evaluators.base", "evaluators._ledger", "evaluators._shipping", "tracking", "_contraction"]),
    ("L4.0", ["evaluators._twins"]),
    ("L4.0", ["evaluators._worker"]),
    ("L4.0", ["evaluators._crew"]),
    ("L4.0", ["evaluators._dispatch"]),
    ("L4.1", ["_curvature", "_error_bars"]),
    ("L4.1", ["evaluators.loop", "evaluators.vmap", "evaluators.batched", "evaluators.pool"]),
    ("L4.2", ["evaluators._exchange", "evaluators._inner"]),
    ("L4.2", ["evaluators._reports"]),
    ("L4.2", ["evaluators.distributed", "evaluators.journal"]),
    ("L4.3", ["evaluators"]),
    ("L4.4", ["_surrogate"]),
    ("L4.5", ["_recipe"]),
    ("L4.5", ["_refusals"]),
    ("L4.6", ["_evidence"]),
    ("L4.7", ["_estimate"]),
    ("L4.5", ["_records"]),
    ("L4.6", ["_descent"]),
    ("L5", ["estimator"]),
    ("L6", ["_autograd", "_options", "optim"]),
    ("L6.1", ["_window", "_particles", "_inputs"]),
    ("L7", ["decorator", "slices", "_unroll"]),
    ("L7.1", ["_check"]),
    ("L7.2", ["_check.moments", "_check.table", "_check.watch"]),
    ("L7.25", ["_check.subject"]),
    ("L7.3", ["_check.distribution", "_check.probes", "_check.sweep"]),
    ("L7.4", ["_check.advice", "_check.radii"]),
    ("L7.5", ["_check.report"]),
    ("L7.6", ["_check.run"]),
    ("L7.7", ["diagnostics"]),
    ("L8", ["nn", "unrolled"]),
    ("L9.0", [""]),  # zograd itself
    ("L9.1", ["compat", "contrib", "contrib.rl"]),
    ("L9.2", ["compat.torchopt"]),
]
LEVEL = {module: rank for rank, (_, modules) in enumerate(LEVELS) for module in modules}


def name_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def level_of(module):
    """The rank of a module; a deeper one of compat.torchopt counts as that."""
    while module not in LEVEL and module.startswith("compat.torchopt."):
        module = module.rpartition(".")[0]
    return LEVEL.get(module)


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


def test_every_module_is_placed():
    missing = [module for module in MODULES if level_of(module) is None]
    assert not missing, f"place {missing} in LEVELS"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m or "zograd")
def test_a_module_imports_lower_levels_only(module):
    if module.startswith("compat.torchopt."):
        pytest.skip("part of compat.torchopt")
    for imported in ours(module):
        assert imported in MODULES, f"{module} imports zograd.{imported}, which does not exist"
        if module == "" or level_of(imported) < level_of(module) or imported.startswith(f"{module}."):
            continue
        pytest.fail(f"zograd.{module} (level {LEVELS[level_of(module)][0]}) imports zograd.{imported}")


def test_there_are_no_cycles():
    # What runs on import only: the package's own __init__ runs first whatever is imported.
    graph = {module: ours(module) - {module} for module in MODULES if module}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_the_front_door_is_imported_by_nothing():
    above = {"", "compat", "compat.torchopt"}
    for module in MODULES:
        if module not in above and not module.startswith("compat.torchopt."):
            assert not ours(module) & {"nn", ""}, module
            assert "decorator" not in ours(module) or module == "nn", module


def test_only_the_tree_module_imports_optree():
    users = [m for m in MODULES if any(name.split(".")[0] == "optree" for name in imports_of(m))]
    assert users == ["_tree"]


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
        ("def f():\n    from zograd.estimator import estimate", {"estimator"}),
        ("if TYPE_CHECKING:\n    from zograd.nn import ZeroOrder", {"nn"}),
        ("from . import nn", {"nn"}),
        ("from .estimator import Estimate", {"estimator"}),
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
