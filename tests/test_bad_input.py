"""Bad input: each gets an error that shows the call as typed, the constraint and the value, before fn is called."""

import math
import re
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch

import zograd
from zograd import distributions, evaluators, shaping, zero_order


def said(*parts):
    """A pattern for a message that holds these parts in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))


class Counted:
    """An objective that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, *rest, **named):
        self.calls += 1
        return (x * torch.arange(1.0, 1.0 + len(x))).sum()


def leaf(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs).add(0.5).requires_grad_()


def refuses(error, *parts, call=lambda f: f(leaf(3)), estimate=lambda f: f.estimate(leaf(3)), **settings):
    """Both ways to use a decorated function refuse, and fn was never called."""
    for use in (call, estimate):
        fn = Counted()
        with pytest.raises(error, match=said(*parts)):
            use(zero_order(**settings)(fn))
        assert fn.calls == 0


# ---------------------------------------------------------------------------------------------------------- settings


SETTINGS = {
    # method
    "method: unknown": ({"method": "central"}, ValueError, "(method=...)", "one of 'naive'", "Scheme", "'central'"),
    "method: capital letter": ({"method": "Naive"}, ValueError, "(method=...)", "one of 'naive'", "'Naive'"),
    "method: number": ({"method": 2}, TypeError, "(method=...)", "name or a Scheme", "int 2"),
    "method: None": ({"method": None}, TypeError, "(method=...)", "name or a Scheme", "None"),
    # num_samples
    "num_samples: zero": ({"num_samples": 0}, ValueError, "(num_samples=...)", "at least 1", "0"),
    "num_samples: negative": ({"num_samples": -3}, ValueError, "(num_samples=...)", "at least 1", "-3"),
    "num_samples: bool": ({"num_samples": True}, TypeError, "(num_samples=...)", "an int", "bool True"),
    "num_samples: float": ({"num_samples": 10.0}, TypeError, "(num_samples=...)", "an int", "float 10.0"),
    "num_samples: tensor": ({"num_samples": torch.tensor(4)}, TypeError, "(num_samples=...)", "an int", "Tensor"),
    "num_samples: string": ({"num_samples": "10"}, TypeError, "(num_samples=...)", "an int", "str '10'"),
    "num_samples: None": (
        {"num_samples": None},
        TypeError,
        "(num_samples=...)",
        "an int",
        "None",
        "`distribution=Coordinate()`",
    ),
    # sigma
    "sigma: zero": ({"sigma": 0}, ValueError, "(sigma=...)", "positive", "0"),
    "sigma: negative": ({"sigma": -0.1}, ValueError, "(sigma=...)` must be positive, got -0.1."),
    "sigma: nan": ({"sigma": math.nan}, ValueError, "(sigma=...)", "positive", "nan"),
    "sigma: inf": ({"sigma": math.inf}, ValueError, "(sigma=...)", "finite", "inf"),
    "sigma: string": ({"sigma": "0.1"}, TypeError, "(sigma=...)", "number", "str '0.1'"),
    "sigma: bool": ({"sigma": True}, TypeError, "(sigma=...)", "number", "bool True"),
    "sigma: None": ({"sigma": None}, TypeError, "(sigma=...)", "number", "None"),
    "sigma: complex": ({"sigma": 1j}, TypeError, "(sigma=...)", "number", "complex 1j"),
    "sigma: tensor of several": ({"sigma": torch.ones(3)}, TypeError, "(sigma=...)", "number", "Tensor"),
    "sigma: array of several": ({"sigma": np.ones(3)}, TypeError, "(sigma=...)", "number", "ndarray"),
    "sigma: empty tree": ({"sigma": {}}, ValueError, "(sigma=...)", "positive number or a tree", "{}"),
    "sigma: bad leaf": ({"sigma": {"w": 0.1, "b": -2.0}}, ValueError, "(sigma=...)", "positive", "-2.0"),
    # argnums
    "argnums: negative": ({"argnums": -1}, ValueError, "(argnums=...)", "from 0", "-1"),
    "argnums: repeated": ({"argnums": (0, 1, 0)}, ValueError, "(argnums=...)", "twice", "(0, 1, 0)"),
    "argnums: string": ({"argnums": "x"}, TypeError, "(argnums=...)", "an int", "str 'x'"),
    "argnums: float": ({"argnums": 0.0}, TypeError, "(argnums=...)", "an int", "float 0.0"),
    "argnums: bool": ({"argnums": True}, TypeError, "(argnums=...)", "an int", "bool True"),
    "argnums: None": ({"argnums": None}, TypeError, "(argnums=...)", "an int", "NoneType None"),
    "argnums: mixed": ({"argnums": (0, "x")}, TypeError, "(argnums=...)", "an int", "str 'x'"),
    "argnums: tensor": ({"argnums": torch.tensor(0)}, TypeError, "(argnums=...)", "an int", "Tensor tensor(0)"),
    "argnums: none": ({"argnums": ()}, ValueError, "(argnums=...)", "name an argument", "()"),
    # evaluator
    "evaluator: unknown": ({"evaluator": "ray"}, ValueError, "(evaluator=...)", "one of 'loop'", "Evaluator", "'ray'"),
    "evaluator: class": ({"evaluator": evaluators.Vmap}, TypeError, "(evaluator=...)", "instance", "class Vmap"),
    "evaluator: None": ({"evaluator": None}, TypeError, "(evaluator=...)", "name or an Evaluator", "None"),
    "evaluator: function": ({"evaluator": map}, TypeError, "(evaluator=...)", "name or an Evaluator", "map"),
    # shaping, failures, batch_dim
    "shaping: name": ({"shaping": "ranks"}, TypeError, "(shaping=...)", "None or a function", "str 'ranks'"),
    "shaping: bool": ({"shaping": True}, TypeError, "(shaping=...)", "None or a function", "bool True"),
    "failures: unknown": ({"failures": "ignore"}, ValueError, "(failures=...)", "'raise'", "'ignore'"),
    "batch_dim: negative": ({"batch_dim": -1}, ValueError, "(batch_dim=...)", "from 0", "-1"),
    "batch_dim: float": ({"batch_dim": 0.0}, TypeError, "(batch_dim=...)", "int", "float 0.0"),
    "batch_dim: bool": ({"batch_dim": True}, TypeError, "(batch_dim=...)", "int", "bool True"),
    "shaping with batch_dim": (
        {"shaping": shaping.leave_one_out, "batch_dim": 0},
        ValueError,
        "(shaping=..., batch_dim=0)",
        "objectives of one value",
    ),
    # randomness
    "generator: number": ({"generator": 5}, TypeError, "(generator=...)", "torch.Generator or None", "int 5"),
    "generator: numpy": (
        {"generator": np.random.default_rng(0)},
        TypeError,
        "(generator=...)",
        "torch.Generator or None",
        "Generator",
    ),
    "seed: negative": ({"seed": -1}, ValueError, "(seed=...)", "[0, 2**63)", "-1"),
    "seed: too large": ({"seed": 2**63}, ValueError, "(seed=...)", "[0, 2**63)", "9223372036854775808"),
    "seed: float": ({"seed": 1.5}, TypeError, "(seed=...)", "int", "float 1.5"),
    "seed: bool": ({"seed": False}, TypeError, "(seed=...)", "int", "bool False"),
    "seed: string": ({"seed": "0"}, TypeError, "(seed=...)", "int", "str '0'"),
    "generator and seed": (
        {"generator": torch.Generator(), "seed": 0},
        ValueError,
        "(generator=..., seed=0)",
        "not have both",
        "a generator and a seed",
    ),
    # distribution
    "distribution: number": ({"distribution": 1.0}, TypeError, "(distribution=...)", "must be", "float 1.0"),
    "distribution: name": ({"distribution": "normal"}, TypeError, "(distribution=...)", "must be", "str 'normal'"),
    "distribution: class": (
        {"distribution": distributions.Gaussian},
        TypeError,
        "(distribution=...)",
        "instance",
        "class Gaussian",
    ),
    "distribution: torch class": (
        {"distribution": torch.distributions.Normal},
        TypeError,
        "(distribution=...)",
        "instance",
        "class Normal",
    ),
    "distribution: variance": (
        {"distribution": torch.distributions.Normal(0.0, 0.1)},
        ValueError,
        "(distribution=...)",
        "mean 0 and variance 1",
        "0 and 0.01",
        "`torch.distributions.Normal(0, 1)`",
        "`sigma=`",
    ),
    "distribution: mean": (
        {"distribution": torch.distributions.Normal(0.5, 1.0)},
        ValueError,
        "(distribution=...)",
        "mean 0 and variance 1",
        "0.5 and 1",
    ),
    "distribution: Uniform(0, 1)": (
        {"distribution": torch.distributions.Uniform(0.0, 1.0)},
        ValueError,
        "(distribution=...)",
        "mean 0 and variance 1",
        "0.5 and 0.08",
    ),
    "distribution: no moments": (
        {"distribution": torch.distributions.Cauchy(0.0, 1.0)},
        ValueError,
        "(distribution=...)",
        "mean 0 and variance 1",
        "nan and inf",
        "Cauchy",
    ),
    "distribution: batch_shape": (
        {"distribution": torch.distributions.Normal(torch.zeros(3), torch.ones(3))},
        ValueError,
        "(distribution=...)",
        "no `batch_shape` and no `event_shape`",
        "(3,) and ()",
    ),
    "distribution: event_shape": (
        {"distribution": torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))},
        ValueError,
        "(distribution=...)",
        "no `batch_shape` and no `event_shape`",
        "() and (3,)",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_setting_is_refused_where_it_is_written(name):
    settings, error, *parts = SETTINGS[name]
    with pytest.raises(error, match=said("`zero_order", *parts)):
        zero_order(**settings)
    fn = Counted()
    decorated = zero_order()(fn)
    with pytest.raises(error, match=said("`zero_order", *parts)):
        decorated.replace(**settings)
    assert fn.calls == 0


def test_numbers_of_other_libraries_are_numbers():
    x = leaf(2)
    for sigma in (1, np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)):
        decorated = zero_order(sigma=sigma, num_samples=np.int64(3), argnums=np.int64(0))(Counted())
        assert decorated.estimate(x).evaluations == 4


def test_an_unknown_setting_of_replace():
    with pytest.raises(TypeError, match=said("`zero_order`", "no setting", "`lr`", "num_samples")):
        zero_order()(Counted()).replace(lr=0.1)


@pytest.mark.parametrize("evaluator", [evaluators.Vmap, evaluators.Batched])
@pytest.mark.parametrize(
    ("chunk_size", "error", "parts"),
    [
        (0, ValueError, ("at least 1", "0")),
        (-8, ValueError, ("at least 1", "-8")),
        (2.0, TypeError, ("an int or None", "float 2.0")),
        (True, TypeError, ("an int or None", "bool True")),
        ("all", TypeError, ("an int or None", "str 'all'")),
        (torch.tensor(8), TypeError, ("an int or None", "Tensor")),
    ],
)
def test_a_bad_chunk_size(evaluator, chunk_size, error, parts):
    with pytest.raises(error, match=said(f"`{evaluator.__name__}(chunk_size=...)`", *parts)):
        evaluator(chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"offsets": (1.0, -1.0), "weights": (1.0, -1.0)}, ("sum(weights * offsets) == 1", "2.0")),
        ({"offsets": (1.0, 1.0), "weights": (0.5, 0.5)}, ("offset twice",)),
        ({"offsets": (1.0, -1.0), "weights": (1.0,)}, ("as many weights as offsets", "1 and 2")),
        ({"offsets": (math.nan,), "weights": (1.0,)}, ("finite",)),
        ({"offsets": (), "weights": ()}, ("sum(weights * offsets) == 1", "0")),
    ],
)
def test_a_bad_scheme(settings, parts):
    with pytest.raises(ValueError, match=said("`Scheme(offsets=", *parts)):
        zograd.Scheme(**settings)


# ------------------------------------------------------------------------------------------------- what is decorated


def test_without_parentheses():
    # `@zero_order` above `def loss(x)` makes loss itself the distribution.
    fn = Counted()
    loss = zero_order(fn)
    with pytest.raises(TypeError, match=said("`zero_order`", "`Counted` as its distribution", "`@zero_order()`")):
        loss(leaf(3))
    assert fn.calls == 0


def test_without_parentheses_and_with_several_arguments():
    fn = Counted()
    loss = zero_order(fn)
    with pytest.raises(TypeError, match=said("`Counted` as its distribution", "`@zero_order()`")):
        loss(leaf(3), torch.ones(3))
    with pytest.raises(TypeError, match=said("`Counted` as its distribution", "`@zero_order()`")):
        loss(leaf(3), scale=2.0)
    assert fn.calls == 0


@pytest.mark.parametrize("thing", [3, None, "loss", torch.zeros(2)], ids=["int", "None", "str", "tensor"])
def test_decorating_what_is_not_callable(thing):
    with pytest.raises(TypeError, match=said("`zero_order(...)`", "callable", type(thing).__name__)):
        zero_order(num_samples=10)(thing)


def test_decorating_a_module():
    with pytest.raises(TypeError, match=said("decorates functions", "Linear", "`zograd.nn.ZeroOrder(module, ...)`")):
        zero_order()(torch.nn.Linear(2, 1))


def test_decorating_twice():
    once = zero_order()(np.sum)
    with pytest.raises(TypeError, match=said("decorated already", "`.replace(...)`")):
        zero_order(num_samples=10)(once)


# --------------------------------------------------------------------------------------------------------- arguments


def test_argnums_out_of_range():
    where = "must index the call's arguments"
    refuses(ValueError, "`zero_order(argnums=(1,))`", where, "no argument 1 in `Counted(<1 positional>)`", argnums=1)
    refuses(
        ValueError,
        "`zero_order(argnums=(0, 4))`",
        where,
        "no argument 4 in `Counted(<1 positional>, scale=...)`",
        call=lambda f: f(leaf(3), scale=2.0),
        estimate=lambda f: f.estimate(leaf(3), scale=2.0),
        argnums=(0, 4),
    )


def test_the_differentiated_argument_is_missing():
    fn = Counted()
    parts = (
        "`zero_order(argnums=(0,))`",
        "must index the call's arguments",
        "no argument 0 in `Counted(<0 positional>)`",
    )
    for use in (zero_order()(fn), zero_order()(fn).estimate):
        with pytest.raises(ValueError, match=said(*parts)):
            use()
    assert fn.calls == 0


@pytest.mark.parametrize(
    "value",
    [2.0, None, [], {"steps": torch.arange(3)}, torch.arange(3), torch.ones(3, dtype=torch.bool), np.ones(3)],
    ids=["float", "None", "empty", "integer in a tree", "integer", "bool", "array"],
)
def test_nothing_to_differentiate(value):
    def use(f):
        return f(value)

    def ask(f):
        return f.estimate(value)

    refuses(ValueError, "`zero_order(argnums=(0,))`", "no floating-point tensor", call=use, estimate=ask)


def test_no_elements():
    def use(f):
        return f(leaf(0))

    def ask(f):
        return f.estimate(leaf(0))

    refuses(ValueError, "`zero_order(argnums=(0,))`", "no elements", "(0,)", call=use, estimate=ask)


def _distributed():
    local = leaf(3)
    local.device_mesh = object()  # what tells a DTensor; a real one needs a process group
    return local


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: leaf(3, dtype=torch.complex64), "complex"),
        (lambda: torch.eye(3).to_sparse().requires_grad_(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr().requires_grad_(), "sparse"),
        (lambda: torch.zeros(3, device="meta", requires_grad=True), "meta"),
        (_distributed, "DTensor"),
    ],
    ids=["complex", "sparse", "sparse csr", "meta", "DTensor"],
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a plain one"])
def test_a_leaf_of_a_kind_that_has_no_directions(make, named, beside):
    argument = {"plain": leaf(2), "odd": make()} if beside else make()

    def use(f):
        return f(argument)

    def ask(f):
        return f.estimate(argument)

    refuses(TypeError, "`zero_order(argnums=(0,))`", "dense and real", named, "(3", call=use, estimate=ask)


def test_a_leaf_of_eight_bits():
    x = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=said("dense and real", "a tensor of torch.float8_e4m3fn", "(3,)")):
        zero_order(sigma=20.0)(lambda x: x.float().sum()).estimate(x)


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a plain one"])
def test_a_quantized_leaf(beside):
    # It cannot require grad, so that a call leaves it alone as it does any frozen leaf; an estimate takes every leaf.
    odd = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    plain, seen = leaf(2), []

    def fn(tree):
        seen.append(tree["odd"])
        return tree["odd"].dequantize().sum() + (tree["plain"] * torch.tensor([1.0, 2.0])).sum()

    decorated = zero_order(num_samples=4, seed=0)(fn)
    out = decorated({"plain": plain if beside else plain.detach(), "odd": odd})
    assert out.item() == pytest.approx(4.5)
    assert out.requires_grad == beside
    assert len(seen) == (5 if beside else 1)
    assert all(torch.equal(s.int_repr(), odd.int_repr()) for s in seen)
    seen.clear()
    with pytest.raises(
        TypeError, match=said("`zero_order(argnums=(0,))`", "dense and real", "quantized", "torch.qint8", "(3,)")
    ):
        decorated.estimate({"plain": plain, "odd": odd})
    assert not seen


@pytest.mark.parametrize(
    ("sigma", "argument"),
    [
        ([0.1, 0.2], leaf(2)),
        ({"w": 0.1}, {"w": leaf(2), "b": leaf(1)}),
        ({"w": 0.1, "c": 0.2}, {"w": leaf(2), "b": leaf(1)}),
        ([0.1, 0.2, 0.3], [leaf(2), leaf(1)]),
        ((0.1, 0.2), [leaf(2), leaf(1)]),
        (OrderedDict(w=0.1, b=0.2), [leaf(2), leaf(1)]),
    ],
    ids=["list for a tensor", "key missing", "other key", "one too many", "tuple for list", "dict for list"],
)
def test_sigma_of_another_structure(sigma, argument):
    def use(f):
        return f(argument)

    def ask(f):
        return f.estimate(argument)

    refuses(ValueError, "`zero_order(sigma=...)`", "structure", str(sigma), call=use, estimate=ask, sigma=sigma)


@pytest.mark.parametrize(
    ("shapes", "parts"),
    [
        ([(3,)], ("(batch_dim=1)", "must have that dimension", "[(3,)]")),
        ([(2, 3), (2, 4)], ("(batch_dim=1)", "equally many slices", "[(2, 3), (2, 4)]")),
    ],
)
def test_leaves_without_the_slices(shapes, parts):
    argument = [leaf(*shape) for shape in shapes]

    def use(f):
        return f(argument)

    def ask(f):
        return f.estimate(argument)

    refuses(ValueError, *parts, call=use, estimate=ask, batch_dim=1)


# ------------------------------------------------------------------------------------------------ the user's sampling


SAMPLES = {
    "transposed": (lambda shape: torch.randn(3, 2), ValueError, "(2, 3)", "(3, 2)"),
    "one value": (lambda shape: torch.randn(()), ValueError, "(2, 3)", "()"),
    "one row": (lambda shape: torch.randn(3), ValueError, "(2, 3)", "(3,)"),
    "float": (lambda shape: 1.0, TypeError, "tensor", "float 1.0"),
    "nothing": (lambda shape: None, TypeError, "tensor", "None"),
    "array": (lambda shape: np.zeros(shape), TypeError, "tensor", "ndarray"),
    "complex": (lambda shape: torch.randn(shape, dtype=torch.complex64), TypeError, "real numbers", "complex64"),
    "sparse": (lambda shape: torch.randn(shape).to_sparse(), TypeError, "dense tensor", "sparse"),
    "bool": (lambda shape: torch.randn(shape) > 0, TypeError, "real numbers", "bool"),
}


class _Sampler:
    def __init__(self, function):
        self._function = function

    def sample(self, sample_shape=()):
        return self._function(sample_shape)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("form", [lambda f: f, _Sampler], ids=["function", "object"])
def test_a_sample_of_a_wrong_shape_or_kind(name, form):
    function, error, *parts = SAMPLES[name]

    def use(f):
        return f(leaf(2, 3))

    def ask(f):
        return f.estimate(leaf(2, 3))

    refuses(
        error, "`zero_order(distribution=...)`", "sample", *parts, call=use, estimate=ask, distribution=form(function)
    )


def test_a_sample_that_is_not_finite():
    refuses(
        zograd.NonFiniteError,
        "`zero_order(distribution=...)`",
        "finite",
        "nan",
        distribution=lambda shape: torch.full(shape, math.nan),
    )


# ------------------------------------------------------------------------------------------------- what fn gives back


def shows_result(out, error, *parts, **settings):
    def fn(x):
        return out

    decorated = zero_order(num_samples=4, **settings)(fn)
    for use in (decorated, decorated.estimate):
        with pytest.raises(error, match=said("`shows_result.<locals>.fn` must return", *parts)):
            use(leaf(3))


@pytest.mark.parametrize(
    ("out", "parts"),
    [
        (None, ("tensor or a number", "None (is a `return` missing?)")),
        ("0.5", ("tensor or a number", "str '0.5'")),
        (True, ("tensor or a number", "bool True")),
        (1j, ("tensor or a number", "complex 1j")),
        ((0.5, 1.0), ("tensor or a number", "tuple (0.5, 1.0)")),
        (np.array("a"), ("tensor or a number", "ndarray")),
        (torch.tensor(3), ("floating-point values", "torch.int64", "()", "`.float()`")),
        (torch.tensor([True, False]), ("floating-point values", "torch.bool", "(2,)")),
        (torch.tensor(1j), ("floating-point values", "torch.complex64")),
    ],
    ids=["nothing", "string", "bool", "complex number", "tuple", "array of strings", "integer", "bools", "complex"],
)
def test_an_fn_that_returns_no_number(out, parts):
    shows_result(out, TypeError, *parts)


def test_an_integer_result_is_fine_where_no_gradient_is_asked_for():
    decorated = zero_order()(lambda x: (x > 0).sum())
    with torch.no_grad():
        assert decorated(leaf(3)).item() == 3
    assert decorated(torch.ones(3)).item() == 3


@pytest.mark.parametrize("evaluator", ["loop", "batched"])
@pytest.mark.parametrize("later", [(), (3,), (2, 1)], ids=str)
def test_another_shape_from_one_call_to_the_next(evaluator, later):
    calls = []

    def fn(x):
        calls.append(x)
        shape = (2,) if len(calls) < 3 else later
        return torch.zeros((len(x), *shape) if evaluator == "batched" else shape)

    decorated = zero_order(num_samples=8, evaluator=evaluators.Batched(2) if evaluator == "batched" else "loop")(fn)
    with pytest.raises(ValueError, match=said(f"`{fn.__qualname__}`", "one shape at all points")):
        decorated(leaf(3))


def test_batched_without_the_leading_axis():
    decorated = zero_order(num_samples=8, evaluator="batched")(lambda x: x.sum())
    with pytest.raises(ValueError, match=said('`evaluator="batched"`', "leading axis", "()", "(1, ...)")):
        decorated(leaf(3))


SHARED = torch.zeros(1, 3)
UNVECTORIZED = {
    "item": lambda x: x.sum().item(),
    "numpy": lambda x: float(np.asarray(x).sum()),
    "tolist": lambda x: sum(x.tolist()[0]),
    "control flow": lambda x: x.sum() if x.sum() > 0 else -x.sum(),
    "shared tensor": lambda x: SHARED.add_(x).sum(),
}


@pytest.mark.parametrize("distribution", [None, distributions.LowRank()], ids=str)
@pytest.mark.parametrize("name", UNVECTORIZED)
def test_an_fn_that_vmap_cannot_follow(name, distribution):
    decorated = zero_order(distribution, num_samples=8, evaluator="vmap")(UNVECTORIZED[name])
    with pytest.raises(RuntimeError, match=said('`evaluator="vmap"`', 'use `evaluator="loop"`')):
        decorated.estimate(torch.full((1, 3), 0.5))


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_shaping_is_for_one_value(evaluator):
    decorated = zero_order(num_samples=4, shaping=shaping.leave_one_out, evaluator=evaluator)(lambda x: x * 2)
    with pytest.raises(ValueError, match=said("`zero_order(shaping=...)`", "objectives of one value", "(3,)")):
        decorated(leaf(3))


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        (lambda values: values[:-1], ("keep the shape", "(4, 2)", "(3, 2)")),
        (lambda values: values.sum(), ("keep the shape", "(4, 2)", "()")),
        (lambda values: values.tolist(), ("keep the shape", "(4, 2)", "list")),
        (lambda values: None, ("keep the shape", "(4, 2)", "None")),
    ],
    ids=["fewer", "one", "list", "nothing"],
)
def test_shaping_that_changes_the_shape(shape, parts):
    decorated = zero_order(method="antithetic", num_samples=4, shaping=shape)(Counted())
    with pytest.raises(ValueError, match=said("`zero_order(shaping=...)`", *parts)):
        decorated(leaf(3))


def test_shaping_that_gives_nan():
    decorated = zero_order(num_samples=4, shaping=lambda values: values / 0.0 * 0.0)(Counted())
    with pytest.raises(ValueError, match=said("`zero_order(shaping=...)`", "finite")):
        decorated(leaf(3))


def test_leave_one_out_of_one():
    with pytest.raises(
        ValueError, match=said("`zero_order(shaping=leave_one_out, num_samples=1, method=NAIVE)`", "at least 2")
    ):
        zero_order(num_samples=1, shaping=shaping.leave_one_out)


def test_shaping_a_scheme_that_is_no_difference_but_uses_the_center():
    scheme = zograd.Scheme(offsets=(0.0, 1.0), weights=(1.0, 1.0))
    with pytest.raises(ValueError, match=said("`zero_order(shaping=..., method=Scheme(", "weights sum to zero")):
        zero_order(method=scheme, shaping=shaping.leave_one_out)


def test_one_value_for_all_slices():
    decorated = zero_order(num_samples=4, batch_dim=0)(lambda x: x.sum())
    with pytest.raises(ValueError, match=said("`zero_order(batch_dim=0)`", "one entry a slice", "5", "()")):
        decorated(leaf(5, 2))


# ------------------------------------------------------------------------------------------------- non-finite values


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("evaluator", ["loop", "vmap", "batched"])
def test_not_finite_at_the_center(bad, evaluator):
    def fn(x):
        total = (x - 0.5).abs().sum(dim=-1)
        return torch.where(total == 0, bad, total)

    decorated = zero_order(num_samples=4, seed=0, evaluator=evaluator)(fn)
    with pytest.raises(
        zograd.NonFiniteError, match=said(f"`{fn.__qualname__}`", "1 non-finite value", "center", str(bad))
    ):
        decorated(leaf(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "make", [float, torch.tensor, np.float64, np.float32], ids=["float", "tensor", "numpy", "float32"]
)
def test_not_finite_at_directions_under_loop(bad, make):
    calls = []

    def fn(x):
        calls.append(x)
        # The center is call 0; then direction 0 at + and -, direction 1 at + and -, ...
        return make(bad if len(calls) - 1 in (6, 8) else 1.0)

    decorated = zero_order(method="antithetic", num_samples=5)(fn)
    with pytest.raises(
        zograd.NonFiniteError,
        match=said(
            f"`{fn.__qualname__}`",
            "non-finite values at 1 of 6 points, those of directions 0 to 2: at ",
            "direction 2 (offset -1). ",
        ),
    ):
        decorated(leaf(3))
    assert len(calls) == 7  # no call after the first that is not finite


@pytest.mark.parametrize("evaluator", [evaluators.Vmap(8), evaluators.Batched(8)], ids=["vmap", "batched"])
def test_not_finite_at_directions_of_a_chunk(evaluator):
    def fn(x):
        total = x.sum(dim=-1)
        return torch.where(total.abs() > 3, math.nan, total)

    decorated = zero_order(method="antithetic", num_samples=8, seed=1, evaluator=evaluator)(fn)
    params = torch.zeros(4)
    directions = zero_order(num_samples=8, seed=1)(lambda x: x.sum()).estimate(params).directions
    bad = directions.noise(0, 8)[0].sum(dim=1).abs() > 3
    assert 1 <= bad.sum() <= 4  # each on both sides
    where = [
        f"direction {i} (offset +1)" if i == bad.nonzero()[0] else f"{i} (offset +1)"
        for i in bad.nonzero().flatten().tolist()
    ]
    with pytest.raises(
        zograd.NonFiniteError, match=said(f"{2 * int(bad.sum())} of 16 points, those of directions 0 to 7: at", *where)
    ):
        decorated.estimate(params)


def test_not_finite_in_a_part_of_a_vector():
    def fn(x):
        return torch.stack([x.sum(), torch.log(-x.sum())])  # the second is nan where the sum is positive

    decorated = zero_order(num_samples=6, seed=0)(fn)
    with pytest.raises(zograd.NonFiniteError, match=said("1 non-finite value of 2", "center")):
        decorated(leaf(2))
    with pytest.raises(zograd.NonFiniteError, match=said("direction", "(offset +1)")):
        decorated.replace(sigma=50.0)(-leaf(2))


def test_many_that_are_not_finite_are_not_all_listed():
    decorated = zero_order(num_samples=50, evaluator="vmap")(lambda x: torch.where(x[0] == 0, 0.0, math.inf))
    with pytest.raises(
        zograd.NonFiniteError,
        match=r"at 50 of 50 points, those of directions 0 to 49: at direction 0 .* 7 \(offset \+1\), \.\.\.",
    ):
        decorated.estimate(torch.zeros(2))


@pytest.mark.parametrize("num", [1, 4])
def test_a_penalty_that_single_precision_cannot_hold(num):
    # Finite where fn computed it, infinite in the gradient.
    decorated = zero_order(num_samples=num, seed=0)(lambda x: 1e300 if x[0] != 0 else 1.0)
    with pytest.raises(zograd.NonFiniteError, match=said("float32")):
        decorated.estimate(torch.zeros(1))


# ------------------------------------------------------------------------------------------------------- an estimate


def test_the_gradient_of_several_values_needs_a_cotangent():
    estimate = zero_order(num_samples=4)(lambda x: x * 2).estimate(torch.ones(3))
    with pytest.raises(ValueError, match=said("`estimate.grad`", "one value", "(3,)", "`estimate.vjp(cotangent)`")):
        _ = estimate.grad
    with pytest.raises(ValueError, match=said("`estimate.vjp(cotangent)`", "shape of the value, (3,)", "(2,)")):
        estimate.vjp(torch.ones(2))


def test_the_seed_outside_of_fn():
    with pytest.raises(RuntimeError, match=said("`zograd.current_seed()`", "inside a function")):
        zograd.current_seed()


@pytest.mark.parametrize("method", ["antithetic", "fourth_order"])
def test_a_step_beyond_the_range_of_the_dtype(method):
    largest = torch.finfo(torch.float32).max
    limit = largest / (2 if method == "fourth_order" else 1)
    with pytest.raises(ValueError, match=r"`zero_order\(sigma=...\)` must make steps within .*float32.*got 1e\+300"):
        zero_order(method=method, sigma=1e300)(lambda x: x.sum()).estimate(torch.ones(2))
    with pytest.raises(
        ValueError, match=r"`zero_order\(sigma=...\)` must make steps within the range of torch.float32"
    ):
        zero_order(method=method, sigma=limit * 1.01)(lambda x: x.sum()).estimate(torch.ones(2))
    estimate = zero_order(method=method, sigma=1e100, seed=0)(lambda x: x.sum()).estimate(torch.ones(2).double())
    assert torch.isfinite(estimate.grad).all()
    x = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"`MeZO\(sigma=...\)` must make steps within the range of torch.float32"):
        zograd.optim.MeZO([x], lr=0.1, sigma=1e300).step(lambda: x.sum())
