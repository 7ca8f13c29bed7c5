"""The public names: complete, documented, and as the page that defines them says."""

import ast
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import zograd

PACKAGE = Path(zograd.__file__).parent
MODULES = [
    "zograd",
    "zograd.diagnostics",
    "zograd.distributions",
    "zograd.evaluators",
    "zograd.nn",
    "zograd.schemes",
    "zograd.shaping",
    "zograd.unrolled",
]


def members():
    """Every public class and function, with where it is found."""
    for module in MODULES:
        found = importlib.import_module(module)
        for name in found.__all__:
            thing = getattr(found, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield pytest.param(thing, id=f"{module}.{name}")


def methods():
    for parameter in members():
        (thing,) = parameter.values
        if inspect.isclass(thing):
            for name, method in vars(thing).items():
                if not name.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
                    yield pytest.param(getattr(method, "fget", method), id=f"{parameter.id}.{name}")


@pytest.mark.parametrize("module", MODULES)
def test_all_names_exist_and_no_others_are_public(module):
    found = importlib.import_module(module)
    assert len(set(found.__all__)) == len(found.__all__)
    for name in found.__all__:
        assert hasattr(found, name)


def test_what_the_package_shows_is_what_it_means_to():
    shown = {name for name in vars(zograd) if not name.startswith("_")}
    below = {path.stem for path in PACKAGE.glob("*") if path.suffix in {".py", ""}}  # modules appear once imported
    assert shown - below <= set(zograd.__all__)


@pytest.mark.parametrize("thing", list(members()))
def test_it_is_documented(thing):
    lines = (thing.__doc__ or "").strip().splitlines()
    assert lines, "no docstring"
    assert lines[0].endswith("."), lines[0]
    if inspect.isfunction(thing):
        for name in inspect.signature(thing).parameters:
            assert re.search(rf"^\s*\**{name}:", thing.__doc__, re.MULTILINE), f"{name} is not documented"
        assert ">>>" in thing.__doc__
        assert "Returns:" in thing.__doc__ or inspect.signature(thing).return_annotation in ("None", None)
    elif not issubclass(thing, (Exception, Warning)) and not inspect.isabstract(thing):
        assert (
            "Args:" in thing.__doc__
            or "Attributes:" in thing.__doc__
            or not inspect.signature(thing).parameters
            or made_by_us(thing)
        )


def made_by_us(thing):
    """Classes that users get and do not make."""
    return thing in (zograd.Estimate, zograd.Options, zograd.ZeroOrderFunction, zograd.nn.ZeroOrderGradientModule)


@pytest.mark.parametrize("method", list(methods()))
def test_its_methods_are_documented(method):
    assert (method.__doc__ or "").strip()


def properties():
    for parameter in members():
        (thing,) = parameter.values
        if inspect.isclass(thing):
            for name, member in vars(thing).items():
                if not name.startswith("_") and isinstance(member, (property, functools.cached_property)):
                    yield pytest.param(member, id=f"{parameter.id}.{name}")


@pytest.mark.parametrize("member", list(properties()))
def test_no_property_is_taken_for_a_type(member):
    """The site reads what stands before a colon in the first line as the type."""
    assert ": " not in member.__doc__.strip().splitlines()[0]


def test_the_signature_of_zero_order():
    got = {
        name: (p.default, p.kind is p.KEYWORD_ONLY)
        for name, p in inspect.signature(zograd.zero_order).parameters.items()
    }
    assert list(got.items()) == [
        ("distribution", (None, False)),
        ("method", ("naive", False)),
        ("argnums", ((0,), False)),
        ("num_samples", (1, False)),
        ("sigma", (1.0, False)),
        ("evaluator", ("loop", True)),
        ("shaping", (None, True)),
        ("failures", ("raise", True)),
        ("batch_dim", (None, True)),
        ("generator", (None, True)),
        ("seed", (None, True)),
        ("surrogate", (None, True)),
    ]


def test_the_forms_of_argnums_and_sigma():
    for settings in ({"sigma": 1, "argnums": 0}, {"sigma": 1.0, "argnums": (0,)}, {"argnums": [0]}, {}):
        options = zograd.zero_order(**settings)(lambda x: x.sum()).options
        assert options.argnums == (0,)
        assert options.sigma == 1.0
        assert isinstance(options.sigma, float)


def test_positional_settings():
    decorated = zograd.zero_order(torch.distributions.Normal(0, 1), "antithetic", 1, 7, 0.5)(
        lambda scale, x: scale * x.sum()
    )
    assert decorated.estimate(2.0, torch.ones(3)).evaluations == 15
    assert decorated.options.distribution == zograd.distributions.Gaussian()
    assert decorated.options.method is zograd.ANTITHETIC


def test_the_wrapper_takes_the_same_settings():
    ours = inspect.signature(zograd.zero_order).parameters
    wrapper = inspect.signature(zograd.nn.ZeroOrder).parameters
    ours_only = ("argnums", "batch_dim", "surrogate")  # a function of the parameters is no module
    assert [n for n in ours if n not in ours_only] == [n for n in wrapper if n != "module"]
    for name, p in wrapper.items():
        if name != "module":
            assert (p.default, p.kind) == (ours[name].default, ours[name].kind)


def test_options_are_frozen():
    options = zograd.zero_order()(lambda x: x.sum()).options
    with pytest.raises(AttributeError, match="sigma"):
        options.sigma = 2.0
    assert options.replace(sigma=2.0).sigma == 2.0
    assert options.sigma == 1.0


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (zograd.BudgetExceeded, RuntimeError),
        (zograd.JournalError, RuntimeError),
        (zograd.NonFiniteError, ValueError),
        (zograd.RankError, RuntimeError),
        (zograd.ReplayError, RuntimeError),
        (zograd.SecondDerivativeError, NotImplementedError),
        (zograd.SharedStreamError, RuntimeError),
        (zograd.ZeroOrderWarning, UserWarning),
    ],
)
def test_errors_are_of_the_kind_that_one_would_catch(error, base):
    assert issubclass(error, base)


def test_the_version_is_the_distributions():
    assert zograd.__version__ == version("zograd")


def test_show_versions(capsys):
    zograd.show_versions()
    out = capsys.readouterr().out
    for word in ("zograd", zograd.__version__, "python", "torch", torch.__version__, "devices"):
        assert word in out


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()


def test_importing_it_is_light_and_leaves_no_trace():
    program = (
        "import sys, random, torch\n"
        "before = set(sys.modules)\n"
        "state = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled(), torch.get_num_threads()\n"
        "import zograd\n"
        "import zograd.compat.torchopt\n"
        "assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()\n"
        "assert state[2:] == (torch.is_grad_enabled(), torch.get_num_threads())\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # What is dear to import comes with what uses it; a limit in seconds would fail on a busy machine and prove nothing.
    dear = {
        "matplotlib",
        "pandas",
        "scipy",
        "sklearn",
        "sqlite3",
        "tqdm",
        "asyncio",
        "multiprocess",
        "loky",
        "distributed",
    }
    assert not dear & set(run.stdout.split())


OTHERS = ["zograd.compat.torchopt", "zograd.contrib.rl", "zograd.failures", "zograd.optim"]


@pytest.mark.parametrize("module", [*MODULES, *OTHERS])
def test_completion_offers_public_names_only(module):
    found = importlib.import_module(module)
    assert dir(found) == sorted(found.__all__)


def window(params, state):
    return params.sum(), state


def instances():
    """One of each kind of thing that a user makes or gets, with words that its repr must have."""
    fn = zograd.zero_order(method="antithetic", num_samples=20, sigma=0.3, seed=5)(lambda x: x.square().sum())
    x, weight = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    other = torch.nn.Parameter(x.clone())
    mezo = zograd.optim.MeZO([{"params": [weight]}, {"params": [other], "lr": 0.5}], lr=0.1, seed=1)
    mezo.step(lambda: weight.sum() + other.sum())
    with zograd.Tracker(budget=100) as tracker:
        fn.estimate(x)
    yield fn, "ANTITHETIC num_samples=20 sigma=0.3 seed=5"
    yield fn.options, "ANTITHETIC num_samples=20 sigma=0.3 seed=5"
    yield fn.estimate(x), "num_samples=20 evaluations=41 seed=5"
    yield fn.estimate(x).directions, "Gaussian num=20 size=3"
    yield tracker, "budget=100 evaluations=41"
    yield zograd.check(lambda x: x.sum(), x, budget=200), "parameters=3 ok= suggestion="
    yield zograd.diagnostics.check_distribution(None, (4,)), "Gaussian size=4 wrong=[]"
    yield zograd.check_slices(lambda x: 2 * x, torch.ones(4, 2)), "subset_error"
    yield zograd.Until(snr=2, at_most=50), "snr=2 at_most=50"
    yield zograd.failures.Retry(3, then=zograd.failures.Drop(0.5)), "3 Drop 0.5"
    yield mezo, "lr=0.1 lr': 0.5 num_samples=1 Gaussian seed=1"
    yield mezo.records, "steps=1 num_samples=1 Gaussian"
    yield zograd.shaping.top_directions(3), "3"
    yield zograd.Scheme((0.0, 1.0), (-1.0, 1.0)), "offsets weights"
    yield zograd.ANTITHETIC, "ANTITHETIC"
    for kind in (zograd.unrolled.PES, zograd.unrolled.NRES, zograd.unrolled.TruncatedES):
        yield kind(window, num_samples=4, sigma=0.2, seed=3), "window num_samples=4 sigma=0.2 Loop seed=3"
    yield zograd.evaluators.Loop(), "Loop()"
    yield zograd.evaluators.Vmap(chunk_size=7), "chunk_size=7"
    yield zograd.evaluators.Batched(), "Batched()"
    yield zograd.evaluators.Pool(workers=2, timeout=5.0), "workers=2 timeout=5.0"
    yield zograd.evaluators.Journal("loop", "a.journal"), "Loop() a.journal"
    yield zograd.evaluators.Distributed(inner="vmap", timeout=60), "Vmap timeout=60"
    yield zograd.contrib.rl.Episodes(dict, window, episodes=3), "episodes=3 steps=0"
    yield zograd.contrib.rl.Normalizer(clip=5.0), "clip=5.0 count=0"
    yield zograd.contrib.rl.Moments(), "count=0"
    yield zograd.distributions.Guided(torch.ones(3, 1), alpha=0.25), "(3, 1) alpha=0.25"
    yield zograd.distributions.LowRank(2), "rank=2"
    for name in ("Coordinate", "Gaussian", "Hadamard", "Orthogonal", "Rademacher", "Sobol", "Sphere"):
        yield getattr(zograd.distributions, name)(), name


def test_every_object_shows_on_one_line_what_it_is_and_its_settings():
    for thing, words in instances():
        shown = repr(thing)
        assert "\n" not in shown, shown
        assert " object at 0x" not in shown, shown
        name = type(thing).__name__.strip("_").lower()
        assert shown.replace("_", "").lower().startswith(name) or isinstance(thing, zograd.Scheme), shown
        assert all(word in shown for word in words.split()), (shown, words)


@pytest.mark.parametrize("thing", list(members()))
def test_signatures_have_types(thing):
    written = {"__init__", "__call__"}  # of the methods with underscores; others may be made by dataclasses
    methods = [m for name, m in vars(thing).items() if name in written or not name.startswith("_")]
    for function in filter(inspect.isfunction, [thing] if inspect.isfunction(thing) else methods):
        parameters = inspect.signature(function).parameters.values()
        assert all(p.annotation is not p.empty for p in parameters if p.name not in ("self", "cls")), function


def test_nothing_is_checked_by_assert():
    # `python -O` drops them. These two narrow a type and check nothing that a user could get wrong.
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                test = ast.unparse(node.test)
                assert test.endswith(" is not None") or test.startswith("isinstance("), f"{path.name}:{node.lineno}"
                assert node.msg is None
