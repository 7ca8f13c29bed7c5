"""``batch_dim``: a direction and a coefficient for each slice, from the same calls on the whole batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.func import jacfwd, jacrev, jvp, vmap

import zograd
from problems import EXACT, ROWS
from zograd import SecondDerivativeError, zero_order
from zograd.distributions import Gaussian, Hadamard, Orthogonal, Rademacher, Sphere

# torch's own forward mode imports decompositions that use what torch deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch.jit:DeprecationWarning")


SLICES = 4
X = torch.tensor([[0.5, 1.0, -1.5], [2.0, -1.0, 0.25], [0.0, 3.0, 1.0], [-2.0, 0.5, 0.75]])  # a row a slice
H = torch.tensor([[2.0, 0.5, 0.0], [0.5, -1.0, 0.25], [0.0, 0.25, 3.0]])
B = torch.tensor([1.0, -2.0, 3.0])
LABELS = torch.tensor([1.0, -2.0, 0.5, 3.0])


def linear(x):
    return x @ B


def quadratic(x):
    return torch.einsum("...i,ij,...j->...", x, H, x) / 2 + x @ B


def numpy_quadratic(x):
    a = x.detach().numpy()
    return np.einsum("...i,ij,...j->...", a, H.numpy(), a) / 2 + a @ B.numpy()


def several(x):
    return torch.stack([quadratic(x), linear(x)], dim=-1)


def square(x):
    return x.unsqueeze(-1) * x.unsqueeze(-2)


OBJECTIVES = [
    (linear, linear),
    (quadratic, quadratic),
    (quadratic, numpy_quadratic),
    (several, several),
    (square, square),
]
each_objective = pytest.mark.parametrize(
    ("truth", "fn"), OBJECTIVES, ids=["linear", "quadratic", "numpy", "vector", "matrix"]
)
each_dim = pytest.mark.parametrize("batch_dim", [0, 1])


def along(fn, batch_dim):
    """The same function of slices that lie along another dimension, in its argument and its value."""
    if batch_dim == 0:
        return fn

    def moved(x):
        out = torch.as_tensor(fn(x.movedim(1, 0).contiguous()))
        return out.movedim(0, 1) if out.dim() > 1 else out.unsqueeze(0)  # one value a slice: (1, slices)

    return moved


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


def leaf(x):
    return x.clone().requires_grad_()


def random_like(value, seed=0):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)


# ------------------------------------------------------------------------------------------------------- right


@each_dim
@each_objective
def test_the_gradient_of_each_slice_is_right(truth, fn, batch_dim):
    x, other = leaf(X.movedim(0, batch_dim)), leaf(X.movedim(0, batch_dim))
    value = zero_order(**EXACT, batch_dim=batch_dim)(along(fn, batch_dim))(x)
    expected = along(truth, batch_dim)(other)
    close(value.detach(), expected.detach())
    cotangent = random_like(value)
    value.backward(cotangent)
    expected.backward(cotangent)
    close(x.grad, other.grad)


@each_dim
@each_objective
def test_jacobians_are_right(truth, fn, batch_dim):
    x = X.movedim(0, batch_dim).contiguous()
    f = zero_order(**EXACT, batch_dim=batch_dim)(along(fn, batch_dim))
    expected = jacrev(along(truth, batch_dim))(x)
    close(jacrev(f)(x), expected)
    close(jacfwd(f)(x), expected)
    tangent = random_like(x, 1)
    close(jvp(f, (x,), (tangent,))[1], jvp(along(truth, batch_dim), (x,), (tangent,))[1])


@pytest.mark.parametrize("evaluator", ["vmap", "batched", zograd.evaluators.Vmap(3), zograd.evaluators.Batched(5)])
@pytest.mark.parametrize("fn", [quadratic, several, square], ids=lambda fn: fn.__name__)
def test_other_evaluators(fn, evaluator):
    x, other = leaf(X), leaf(X)
    value = zero_order(**EXACT, batch_dim=0, evaluator=evaluator)(fn)(x)
    cotangent = random_like(value)
    value.backward(cotangent)
    fn(other).backward(cotangent)
    close(x.grad, other.grad)


@pytest.mark.parametrize("method", ["naive", "forward", "antithetic", "fourth_order"])
@pytest.mark.parametrize("distribution", [Gaussian(), Rademacher(), Sphere()], ids=str)
def test_the_mean_is_right_for_every_scheme_and_distribution(distribution, method):
    n = 8000
    f = zero_order(distribution, method, num_samples=n, sigma=0.5, batch_dim=0, evaluator="vmap", seed=3)(quadratic)
    estimate = f.estimate(X)
    noise = estimate.directions.noise(0, n)[0].view(n, SLICES, 3)
    rows = estimate.coefficients[:, :, None] * noise / 0.5
    error = rows.std(dim=0) / math.sqrt(n)
    close(estimate.grad.double(), rows.mean(dim=0).double())
    assert ((estimate.grad - (X @ H + B)).abs() < 5 * error).all()
    assert (error < 0.5).all()


@each_dim
def test_several_leaves(batch_dim):
    def fn(tree, labels):
        p, q = tree["p"].movedim(batch_dim, 0), tree["q"].movedim(batch_dim, 0)
        out = torch.stack([(p**2).sum(1) * labels + q[:, 0, 0], p[:, 0] - 2 * q[:, 1, 0] + labels], dim=1)
        return out.movedim(0, batch_dim)

    leaves = {
        "p": torch.arange(8.0).view(4, 2).movedim(0, batch_dim),
        "q": torch.arange(8.0).view(4, 2, 1).movedim(0, batch_dim),
        "frozen": torch.ones(5),
        "index": torch.arange(3),
    }
    trees = [{k: leaf(v) if k in "pq" else v for k, v in leaves.items()} for _ in range(2)]
    value = zero_order(**EXACT, batch_dim=batch_dim)(fn)(trees[0], labels=LABELS)
    cotangent = random_like(value)
    value.backward(cotangent)
    fn(trees[1], LABELS).backward(cotangent)
    close(trees[0]["p"].grad, trees[1]["p"].grad)
    close(trees[0]["q"].grad, trees[1]["q"].grad)


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_several_arguments_and_a_sigma_for_each(evaluator):
    def fn(a, labels, b):
        return (a**2).sum(1) * labels + b.sum((1, 2))

    a, b = leaf(X[:, :2]), leaf(torch.ones(4, 1, 2))
    options = {**EXACT, "sigma": (0.5, 0.25), "argnums": (0, 2), "evaluator": evaluator}
    zero_order(**options, batch_dim=0)(fn)(a, LABELS, b).backward(LABELS)
    close(a.grad, 2 * X[:, :2] * (LABELS**2)[:, None])
    close(b.grad, LABELS.view(4, 1, 1).expand(4, 1, 2))


def test_a_block_in_the_middle_of_a_network():
    torch.manual_seed(1)
    first, last = torch.nn.Linear(2, 3), torch.nn.Linear(2, 1)
    data = torch.randn(SLICES, 2)
    block = zero_order(**EXACT, batch_dim=0)(several)
    grads = []
    for middle in (block, several):
        loss = last(torch.tanh(middle(torch.tanh(first(data))))).square().mean()
        grads.append(torch.autograd.grad(loss, [*first.parameters(), *last.parameters()]))
    for got, expected in zip(*grads, strict=True):
        close(got, expected)


def test_estimate_has_the_gradient_of_each_slice():
    estimate = zero_order(**EXACT, batch_dim=0)(quadratic).estimate(X)
    close(estimate.value, quadratic(X))
    close(estimate.grad, X @ H + B)
    assert estimate.coefficients.shape == (ROWS, SLICES)
    assert estimate.evaluations == 2 * ROWS + 1
    cotangent = random_like(estimate.value)
    close(estimate.vjp(cotangent), cotangent[:, None] * (X @ H + B))
    vector = zero_order(**EXACT, batch_dim=0)(several).estimate(X)
    with pytest.raises(ValueError, match=r"estimate.vjp\(cotangent\)"):
        _ = vector.grad


def test_backward_is_the_vjp_of_the_estimate():
    for fn in (quadratic, several):
        f = zero_order(method="antithetic", num_samples=5, sigma=0.1, batch_dim=0, seed=2)(fn)
        x, estimate = leaf(X), f.estimate(X)
        value = f(x)
        cotangent = random_like(value)
        value.backward(cotangent)
        close(x.grad, estimate.vjp(cotangent))


def test_without_grad_mode_there_is_one_plain_call():
    calls = []
    f = zero_order(**EXACT, batch_dim=0)(lambda x: calls.append(0) or several(x))
    with torch.no_grad():
        assert torch.equal(f(leaf(X)), several(X))
    assert torch.equal(f(X), several(X))
    assert len(calls) == 2


def test_any_number_of_slices_from_call_to_call():
    f = zero_order(**EXACT, batch_dim=0)(quadratic)
    for slices in (1, 2, 5, 3):
        x = leaf(X[torch.arange(slices) % SLICES])
        f(x).sum().backward()
        close(x.grad, x.detach() @ H + B)


def test_vmap_over_a_function_with_slices():
    xs = torch.stack([X, X + 1])
    close(vmap(zero_order(**EXACT, batch_dim=0)(quadratic))(xs), quadratic(xs))
    close(vmap(jacrev(zero_order(**EXACT, batch_dim=0)(several)))(xs), vmap(jacrev(several))(xs))


def test_a_second_derivative_is_an_error():
    for fn in (quadratic, several):
        x = leaf(X)
        (g,) = torch.autograd.grad(zero_order(**EXACT, batch_dim=0)(fn)(x).sum(), x, create_graph=True)
        with pytest.raises(SecondDerivativeError, match="second derivative"):
            torch.autograd.grad(g.sum(), x)


# ------------------------------------------------------------------------------------------------ slices on their own


@pytest.mark.parametrize(
    "distribution",
    [Gaussian(), Rademacher(), Sphere(), Orthogonal(), Orthogonal("sqrt_d"), Hadamard()],
    ids=str,
)
def test_each_slice_has_a_direction_of_its_own(distribution):
    f = zero_order(distribution, num_samples=6, batch_dim=0, seed=1)(lambda x: x.sum(1))
    noise = f.estimate(torch.zeros(5, 40)).directions.noise(0, 6)[0].view(6 * 5, 40)
    cosines = torch.nn.functional.cosine_similarity(noise[:, None], noise[None], dim=2) - torch.eye(30)
    assert cosines.abs().max() < 0.7  # 435 pairs of sd 0.16
    if not isinstance(distribution, Gaussian) and not distribution.gaussian_marginals:
        close((noise**2).sum(1), torch.full((30,), 40.0))


def test_the_gradient_of_a_slice_does_not_hang_on_the_values_of_others():
    def fn(x, gain):
        return quadratic(x) * gain

    f = zero_order(method="antithetic", num_samples=3, sigma=0.1, batch_dim=0, seed=1)(fn)
    quiet = f.estimate(X, torch.tensor([1.0, 0.0, 0.0, 0.0])).grad
    loud = f.estimate(X, torch.tensor([1.0, 1e6, -1e6, 1e6])).grad
    assert torch.equal(quiet[0], loud[0])
    assert not quiet[1:].any()


def test_bits_do_not_hang_on_the_evaluator_or_the_chunk():
    def fn(x):
        return (x.double() ** 2).sum(-1).round(decimals=3)

    x = torch.linspace(-1, 1, 24).view(4, 6)
    options = {"method": "antithetic", "num_samples": 11, "sigma": 0.5, "batch_dim": 0, "seed": 1}
    expected = zero_order(**options)(fn).estimate(x)
    for evaluator in ("vmap", "batched", zograd.evaluators.Vmap(2), zograd.evaluators.Batched(3)):
        estimate = zero_order(**options, evaluator=evaluator)(fn).estimate(x)
        assert torch.equal(estimate.coefficients, expected.coefficients)
        assert torch.equal(estimate.grad, expected.grad)


def test_memory_is_that_of_a_block_also_with_many_slices():
    # 300 directions of 64 * 16 values are five blocks of 64.
    f = zero_order(method="antithetic", num_samples=300, sigma=0.1, batch_dim=0, evaluator="vmap", seed=1)
    slopes = random_like(torch.empty(64, 16))
    estimate = f(lambda x: (x * slopes).sum(1)).estimate(torch.zeros(64, 16))
    assert len(list(estimate.directions.blocks())) == 5
    c = estimate.coefficients.float()
    rows = torch.cat([estimate.directions.noise(lo, hi)[0].clone() for lo, hi in estimate.directions.blocks()])
    close(estimate.grad, torch.einsum("ns,nsd->sd", c, rows.view(300, 64, 16)) / 300 / 0.1)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize(("slices", "dim", "num"), [(64, 16, 16), (32, 4, 16), (128, 10, 4)])
def test_the_cosine_to_the_truth_follows_the_law(slices, dim, num):
    slopes = random_like(torch.empty(slices, dim), 5)
    by_slice = zero_order(method="antithetic", num_samples=num, sigma=0.1, batch_dim=0)(lambda x: (x * slopes).sum(1))
    whole = zero_order(method="antithetic", num_samples=num, sigma=0.1)(lambda x: (x * slopes).sum())
    x = torch.zeros(slices, dim)
    runs = 20
    mean = [
        sum(cosine(f.replace(seed=k).estimate(x).grad, slopes) for k in range(runs)) / runs for f in (by_slice, whole)
    ]
    assert abs(mean[0] - math.sqrt(num / (num + dim))) < 0.03
    assert abs(mean[1] - math.sqrt(num / (num + slices * dim))) < 0.03
    assert mean[0] > 2 * mean[1]


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_value_without_the_slices_is_an_error():
    f = zero_order(**EXACT, batch_dim=0)
    with pytest.raises(ValueError, match=r"batch_dim=0\).*one entry a slice, 4 along dimension 0, got the shape \(\)"):
        f(lambda x: x.sum())(leaf(X))
    with pytest.raises(ValueError, match=r"one entry a slice, 4 along dimension 0, got the shape \(3,\)"):
        f(lambda x: x.sum(0))(leaf(X))
    with pytest.raises(
        ValueError, match=r"batch_dim=1\).*one entry a slice, 3 along dimension 1, got the shape \(4,\)"
    ):
        zero_order(**EXACT, batch_dim=1)(lambda x: x.sum(1))(leaf(X))


def test_leaves_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"batch_dim=0\).*equally many slices, got shapes \[\(4, 3\), \(3,\)\]"):
        zero_order(**EXACT, batch_dim=0, argnums=(0, 1))(lambda x, y: x.sum(1))(leaf(X), leaf(B))
    with pytest.raises(ValueError, match=r"batch_dim=1\).*must have that dimension, got shapes \[\(3,\)\]"):
        zero_order(**EXACT, batch_dim=1)(lambda x: x)(leaf(B))


@pytest.mark.parametrize(
    ("batch_dim", "kind", "message"),
    [
        (-1, ValueError, "got -1"),
        (1.5, TypeError, "must be an int, got float 1.5"),
        (True, TypeError, "must be an int"),
    ],
)
def test_a_batch_dim_out_of_range_is_an_error(batch_dim, kind, message):
    with pytest.raises(kind, match=rf"zero_order\(batch_dim=.*{message}"):
        zero_order(batch_dim=batch_dim)


def test_shaping_is_for_one_value():
    with pytest.raises(ValueError, match=r"shaping=..., batch_dim=0"):
        zero_order(batch_dim=0, method="antithetic", shaping=zograd.shaping.leave_one_out)


# ------------------------------------------------------------------------------------------------------ check_slices


def centered(x):
    return (x - x.mean(0)).square().sum(1)


def neighbors(x):
    return x.sum(1) + 0.01 * x.roll(1, 0).sum(1)


def cumulative(x):
    return x.sum(1).cumsum(0)


def first_to_last(x):
    return x.sum(1) + torch.linspace(0, 1, len(x))  # by its place in the batch


MIXING = [centered, neighbors, cumulative, first_to_last, lambda x: x.softmax(0).square().sum(1)]


@pytest.mark.parametrize("fn", [linear, quadratic, numpy_quadratic, several, square], ids=lambda fn: fn.__name__)
def test_check_slices_passes_independent_slices(fn):
    check = zograd.check_slices(fn, X)
    assert check
    assert max(check.subset_error, check.permutation_error) < 1e-5
    assert "independent" in str(check)
    assert "NOT" not in str(check)


@pytest.mark.parametrize("fn", MIXING, ids=lambda fn: fn.__name__)
def test_check_slices_finds_mixed_slices(fn):
    check = zograd.check_slices(fn, X)
    assert not check
    assert "NOT independent" in str(check)


@each_dim
def test_check_slices_takes_the_settings_of_a_decorated_function(batch_dim):
    x = X.movedim(0, batch_dim)
    for fn, independent in [(quadratic, True), (centered, False)]:
        f = zero_order(**EXACT, batch_dim=batch_dim)(along(fn, batch_dim))
        assert bool(zograd.check_slices(f, x)) == independent
        assert bool(zograd.check_slices(along(fn, batch_dim), x, batch_dim=batch_dim)) == independent


def test_check_slices_with_several_arguments():
    def fn(a, labels, b, *, scale=1.0):
        return ((a**2).sum(1) * labels + b.sum((1, 2))) * scale

    b = torch.arange(8.0).view(4, 1, 2)
    assert zograd.check_slices(fn, X, LABELS, b, argnums=(0, 2), along=(1,), scale=2.0)
    assert zograd.check_slices(fn, X, LABELS, b, argnums=(0, 2), along=1)
    assert not zograd.check_slices(
        lambda a, labels, b: fn(a, labels, b - b.mean(0)), X, LABELS, b, argnums=(0, 2), along=1
    )
    f = zero_order(**EXACT, batch_dim=0, argnums=(0, 2))(fn)
    assert zograd.check_slices(f, X, LABELS, b, along=(1,))


def test_check_slices_leaves_arguments_and_the_random_state_alone():
    def fn(x):
        torch.rand(3)
        with torch.no_grad():
            x.mul_(2)
        return x.sum(1)

    x, state = leaf(X), torch.get_rng_state()
    assert zograd.check_slices(fn, x)
    assert torch.equal(x.detach(), X)
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_check_slices_does_not_pass_values_that_are_not_numbers():
    def fn(x):
        return (
            torch.where(x[:, 0] == x[0, 0], x.sum(1), torch.nan)
            if len(x) == SLICES and x[0, 0] != X[0, 0]
            else x.sum(1)
        )

    assert not zograd.check_slices(fn, X)


def test_check_slices_sees_mixing_below_a_large_constant():
    assert not zograd.check_slices(lambda x: 1e5 + x.double().sum(1) + x.double().mean(), X)


def test_check_slices_needs_slices():
    with pytest.raises(ValueError, match=r"check_slices\(batch_dim=0\).*two at least, got \{1\}"):
        zograd.check_slices(linear, X[:1])
    with pytest.raises(ValueError, match=r"check_slices\(batch_dim=0\).*equally many"):
        zograd.check_slices(lambda x, y: x.sum(1), X, X[:3], argnums=(0, 1))
    with pytest.raises(ValueError, match=r"must return one entry a slice, 4 along dimension 0, got the shape \(\)"):
        zograd.check_slices(lambda x: x.sum(), X)
