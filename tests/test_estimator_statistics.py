"""Means and variances of estimates against closed forms, with stated error rates (statistical.py)."""

import itertools
import math

import pytest
import torch

from problems import SCALARS, SCHEMES, Cubic, Quadratic
from statistical import draws, flat, noise, per_direction
from zograd import ANTITHETIC, FORWARD, NAIVE, zero_order
from zograd.distributions import Gaussian, Rademacher, Sphere
from zograd.shaping import leave_one_out

pytestmark = pytest.mark.statistics

EFFECT = 0.1  # a slope or a variance off by 10 % is noticed


class Standard:
    """The page's class with ``sample``."""

    def sample(self, sample_shape=()):
        return torch.randn(sample_shape)


def standard(shape):
    return torch.randn(shape)


FAMILIES = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "sphere": Sphere(),
    "sample": Standard(),
    "function": standard,
    "torch": torch.distributions.Uniform(-(3**0.5), 3**0.5),
}
ADAPTED = ("sample", "function", "torch")  # drawn row by row, and so not in large numbers


def fourth_moment(family, d):
    return {"rademacher": 1.0, "sphere": 3 * d / (d + 2), "torch": 1.8}.get(family, 3.0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("problem", SCALARS, ids=lambda p: p.name)
def test_one_dimension(problem, scheme, checks):
    mean, variance, kurtosis = problem.moments(scheme)
    expected = problem.mean(scheme)
    assert mean == pytest.approx(expected, rel=1e-4)  # the closed form agrees with integration
    if scheme in problem.variances:
        assert variance == pytest.approx(problem.variances[scheme], rel=1e-3)
    num = max(draws(variance / expected**2, EFFECT), draws(kurtosis, EFFECT))
    fn = zero_order(method=scheme, num_samples=num, sigma=problem.sigma, evaluator="vmap", seed=checks.seed())(
        problem.fn
    )
    estimate = fn.estimate(torch.tensor(problem.x, dtype=torch.float64))
    assert estimate.value.item() == problem.value()
    rows = per_direction(estimate, problem.sigma)
    checks.mean(rows, expected, effect=EFFECT * abs(expected), what=problem.name)
    checks.trace(rows, expected, problem.variances.get(scheme, variance), effect=EFFECT, what=problem.name)
    if scheme is NAIVE:  # whose coefficients are the values themselves
        smoothed = problem.smoothed(problem.sigma)
        checks.mean(estimate.coefficients, smoothed, effect=EFFECT * abs(smoothed), what=f"smoothed {problem.name}")


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *itertools.product(["gaussian", "rademacher", "sphere", "function"], SCHEMES),
        ("sample", NAIVE),  # the two adapted forms differ in the call alone
    ],
    ids=str,
)
def test_trace_of_the_covariance(family, scheme, checks):
    problem = Quadratic()
    adapted = family in ADAPTED
    num = 12_000 if adapted else 200_000  # a row of a user's sample takes a call for each leaf
    options = {"method": scheme, "num_samples": num, "sigma": problem.sigma, "evaluator": "vmap", "seed": checks.seed()}
    estimate = zero_order(FAMILIES[family], **options)(problem).estimate(problem.params())
    rows = per_direction(estimate, problem.sigma)
    size = float(problem.gradient.norm())
    checks.mean(rows, problem.gradient, effect=(0.6 if adapted else 0.2) * size, what=family)
    trace = problem.trace("gaussian" if adapted else family, scheme)
    checks.trace(rows, problem.gradient, trace, effect=0.45 if adapted else EFFECT, what=family)


def test_covariance_is_the_closed_form_and_not_its_trace_only(checks):
    problem = Quadratic()
    options = {"method": "antithetic", "num_samples": 300_000, "sigma": problem.sigma, "evaluator": "vmap"}
    estimate = zero_order(**options, seed=checks.seed())(problem).estimate(problem.params())
    g = problem.gradient
    centered = per_direction(estimate, problem.sigma) - g
    products = torch.einsum("ni,nj->nij", centered, centered)
    expected = g.square().sum() * torch.eye(problem.d, dtype=torch.float64) + torch.outer(g, g)
    checks.mean(products, expected.flatten(), effect=float(0.15 * expected.max()), what="covariance")


@pytest.mark.parametrize("family", FAMILIES)
def test_fourth_moments_of_directions(family, checks):
    problem, sigma = Cubic(), 0.8
    num = 20_000 if family in ADAPTED else 150_000
    options = {"method": "antithetic", "num_samples": num, "sigma": sigma, "evaluator": "vmap", "seed": checks.seed()}
    estimate = zero_order(FAMILIES[family], **options)(problem).estimate(problem.x)
    rows = per_direction(estimate, sigma)
    moment = fourth_moment(family, problem.d)
    expected = problem.antithetic(sigma, moment)
    checks.mean(rows, expected, effect=0.3 * float(expected.norm()), what=family)
    values = noise(estimate.directions)
    checks.mean(values, 0.0, effect=0.12, what="mean of directions")
    checks.mean(values.square(), 1.0, effect=0.2, what="variance of directions")
    checks.mean(values[:, 0] ** 4, moment, effect=(0.4 if family in ADAPTED else 0.2) * moment, what="fourth moment")


@pytest.mark.parametrize("family", FAMILIES)
def test_variance_on_a_linear_function_follows_the_fourth_moment(family, checks):
    a = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)
    num = 20_000 if family in ADAPTED else 150_000
    options = {"method": "antithetic", "num_samples": num, "sigma": 0.3, "evaluator": "vmap", "seed": checks.seed()}
    estimate = zero_order(FAMILIES[family], **options)(lambda x: x @ a).estimate(torch.zeros(3, dtype=torch.float64))
    rows = per_direction(estimate, 0.3)
    checks.mean(rows, a, effect=0.2 * float(a.norm()), what=family)
    factor = 2.0 if family == "sphere" else fourth_moment(family, 3) + 1
    expected = factor * float(a.square().sum())
    checks.trace(rows, a, expected, effect=0.4 if family in ADAPTED else 0.2, what=family)


@pytest.mark.parametrize("scheme", [NAIVE, FORWARD, ANTITHETIC], ids=repr)
@pytest.mark.parametrize("radius", [0.3, 1.2])
def test_sphere_estimates_the_gradient_of_the_ball_smoothed_function(scheme, radius, checks):
    # In one dimension the ball is an interval, over which the mean slope is the difference of the ends.
    x = torch.tensor([0.4], dtype=torch.float64)
    fn = lambda x: torch.sin(2 * x[0]) + x[0].abs()  # noqa: E731
    expected = float(fn(x + radius) - fn(x - radius)) / (2 * radius)
    options = {"method": scheme, "num_samples": 60_000, "sigma": radius, "evaluator": "vmap", "seed": checks.seed()}
    rows = per_direction(zero_order(Sphere(), **options)(fn).estimate(x), radius)
    level = float((fn(x + radius) + fn(x - radius)) / 2 - (fn(x) if scheme is FORWARD else 0))
    checks.mean(rows, expected, effect=0.2 * abs(expected))
    if scheme is ANTITHETIC:
        assert (rows - expected).abs().max() < 1e-12
    else:
        checks.trace(rows, expected, (level / radius) ** 2, effect=0.1)


# ------------------------------------------------------------------------------------------------ means of directions


def repeated(problem, num, repetitions, checks, **options):
    generator = torch.Generator().manual_seed(checks.seed())
    fn = zero_order(num_samples=num, sigma=problem.sigma, evaluator="batched", generator=generator, **options)(problem)
    return torch.stack([fn.estimate(problem.x).grad for _ in range(repetitions)])


@pytest.mark.parametrize("num", [10, 100, 1000])
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("gaussian", NAIVE),
        ("gaussian", FORWARD),
        ("gaussian", ANTITHETIC),
        ("rademacher", FORWARD),
        ("sphere", ANTITHETIC),
    ],
    ids=str,
)
def test_variance_falls_with_the_number_of_directions(family, scheme, num, checks):
    """The law that a baseline overwritten in the loop, noise kept over blocks or a wrong divisor breaks."""
    problem = Quadratic()
    # The square of an estimate's error is spread the more, the fewer directions are in it.
    repetitions = {10: 1200, 100: 700, 1000: 600}[num]
    grads = repeated(problem, num, repetitions, checks, distribution=FAMILIES[family], method=scheme)
    expected = problem.trace(family, scheme) / num
    checks.mean(grads, problem.gradient, effect=0.5 * math.sqrt(expected), what="mean")
    checks.trace(grads, problem.gradient, expected, effect=0.5, what=f"N = {num}")


class SmallBlocks(Gaussian):
    """Blocks of 8 directions, so that few directions make many blocks."""

    def rows(self, space, num):
        return 8


@pytest.mark.parametrize("scheme", [NAIVE, FORWARD, ANTITHETIC], ids=str)
def test_variance_falls_with_the_number_of_blocks(scheme, checks):
    """Noise made once for all blocks would leave the variance of 8 directions, 25 times as large."""
    problem = Quadratic()
    grads = repeated(problem, 203, 600, checks, distribution=SmallBlocks(), method=scheme)
    expected = problem.trace("gaussian", scheme) / 203
    checks.mean(grads, problem.gradient, effect=0.6 * math.sqrt(expected), what="mean")
    checks.trace(grads, problem.gradient, expected, effect=0.6, what="blocks")


@pytest.mark.parametrize("num", [4, 10, 100])
def test_leave_one_out_keeps_the_mean_and_drops_the_level(num, checks):
    """On a linear function the estimate is the sample covariance of the directions times the slope: Wishart moments."""
    problem = Quadratic(curved=False)
    problem.c0 = 30.0  # its variance without a baseline is 4000 times as large
    repetitions = {4: 3000, 10: 1500, 100: 800}[num]
    grads = repeated(problem, num, repetitions, checks, method="naive", shaping=leave_one_out)
    expected = (problem.d + 1) * float(problem.gradient.square().sum()) / (num - 1)
    checks.mean(grads, problem.gradient, effect=0.5 * math.sqrt(expected), what="mean")
    checks.trace(grads, problem.gradient, expected, effect=0.5, what=f"N = {num}")


def test_leave_one_out_does_not_shrink_the_gradient(checks):
    """A mean baseline that includes the direction itself scales the gradient by 1 - 1/N: a half at N = 2."""
    problem = Quadratic()
    grads = repeated(problem, 2, 3500, checks, method="naive", shaping=leave_one_out)
    slope = grads @ problem.gradient / problem.gradient.square().sum()
    checks.mean(slope, 1.0, effect=0.45)


# --------------------------------------------------------------------------------------------------------------- slices


def slices(scheme, checks, num):
    """Six slices of three, each linear with a slope of its own; the mean and trace of each slice's estimate."""
    weights = torch.linspace(-1, 2, 18, dtype=torch.float64).view(6, 3)
    options = {"method": scheme, "num_samples": num, "sigma": 0.5, "evaluator": "vmap", "batch_dim": 0}
    fn = zero_order(**options, seed=checks.seed())(lambda x: (x * weights).sum(dim=1) + 0.5)
    return fn.estimate(torch.zeros(6, 3, dtype=torch.float64)), weights


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_slices_have_the_variance_of_their_own_size(scheme, checks):
    num, sigma = 100_000, 0.5
    estimate, weights = slices(scheme, checks, num)
    assert estimate.coefficients.shape == (num, 6)
    rows = estimate.coefficients[:, :, None] * noise(estimate.directions).view(num, 6, 3) / sigma
    torch.testing.assert_close(rows.mean(dim=0), estimate.grad)
    for b, slope in enumerate(weights):
        level = (0.5 / sigma) ** 2 * 3 if scheme is NAIVE else 0.0
        expected = 4 * float(slope.square().sum()) + level
        checks.mean(rows[:, b], slope, effect=0.2 * math.sqrt(expected), what=f"slice {b}")
        checks.trace(rows[:, b], slope, expected, effect=0.2, what=f"slice {b}")


def test_slices_are_estimated_independently_of_each_other(checks):
    estimate, weights = slices("antithetic", checks, 100_000)
    rows = estimate.coefficients[:, :, None] * noise(estimate.directions).view(-1, 6, 3) / 0.5 - weights
    products = torch.einsum("ni,nj->nij", rows[:, 1], rows[:, 4])
    size = float(weights[1].norm() * weights[4].norm())
    checks.mean(products, 0.0, effect=0.25 * size, what="covariance of two slices")


def test_slices_turn_toward_the_gradient(checks):
    """The squared cosine is N / (N + d) with a direction a slice, and N / (N + B d) without: 0.5 against 0.015."""
    B, d, num = 64, 16, 16
    weights = torch.randn(B, d, dtype=torch.float64)
    fn = zero_order(method="antithetic", num_samples=num, sigma=0.1, batch_dim=0, evaluator="vmap")
    linear = fn(lambda x: (x * weights).sum(dim=1))
    cosines = []
    for _ in range(60):
        grad = linear.replace(seed=checks.seed()).estimate(torch.zeros(B, d, dtype=torch.float64)).grad
        cosines.append((grad * weights).sum() / (grad.norm() * weights.norm()))
    # The ratio of means is not the mean of ratios: over B d = 1024 values the difference is below a hundredth.
    checks.mean(torch.stack(cosines), math.sqrt(num / (num + d + 1)), effect=0.1, slack=0.01)


def test_vector_outputs_contract_with_the_jacobian(checks):
    J = torch.tensor([[1.0, -2.0], [0.5, 0.3], [-1.0, 0.8]], dtype=torch.float64)
    fn = zero_order(method="antithetic", num_samples=40_000, sigma=0.3, evaluator="vmap", seed=checks.seed())
    estimate = fn(lambda x: J @ x).estimate(torch.tensor([0.2, -0.1], dtype=torch.float64))
    cotangent = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
    rows = (estimate.coefficients @ cotangent)[:, None] * noise(estimate.directions) / 0.3
    torch.testing.assert_close(rows.mean(dim=0), estimate.vjp(cotangent))
    expected = cotangent @ J
    checks.mean(rows, expected, effect=0.15 * float(expected.norm()))
    checks.trace(rows, expected, 3 * float(expected.square().sum()), effect=0.25)


def test_sigma_of_each_leaf(checks):
    problem = Quadratic()
    sigma = {"first": 0.1, "second": 2.0, "third": 0.5}
    options = {"method": "antithetic", "num_samples": 100_000, "sigma": sigma, "evaluator": "vmap"}
    estimate = zero_order(**options, seed=checks.seed())(problem).estimate(problem.params())
    scale = torch.tensor([0.1, 0.1, 2.0, 2.0, 0.5], dtype=torch.float64)
    rows = estimate.coefficients[:, None] * noise(estimate.directions) / scale
    torch.testing.assert_close(rows.mean(dim=0), flat(estimate.grad))
    # In units of each leaf's sigma it is the estimate of one radius: gradient g * sigma, trace (d + 1) |g sigma|^2.
    g = problem.gradient * scale
    checks.mean(rows * scale, g, effect=0.2 * float(g.norm()))
    checks.trace(rows * scale, g, 6 * float(g.square().sum()), effect=0.15)


def test_nested_estimate_has_the_mean_of_its_closed_form(checks):
    """One adaptation step by an inner estimate of K pairs, independent of the outer one, whose noise adds curvature."""
    h, rate, K = 1.5, 0.4, 2
    bowl = lambda x: h / 2 * (x - 0.3).square().sum()  # noqa: E731
    x = torch.tensor([1.1], dtype=torch.float64)
    inner = zero_order(method="antithetic", num_samples=K, sigma=0.2)(bowl)
    outer = zero_order(Rademacher(), "antithetic", num_samples=1500, sigma=0.3, seed=checks.seed())
    rows = per_direction(outer(lambda x: bowl(x - rate * inner.estimate(x).grad)).estimate(x), 0.3)
    bracket = (1 - rate * h) ** 2 + 2 * (rate * h) ** 2 / K
    # Inner directions that were all the same would give no mean, and none at all less than a third of it.
    checks.mean(rows, h * (x - 0.3) * bracket, effect=0.6 * h * float(x - 0.3) * bracket)
    assert len(rows.unique()) == len(rows)  # each direction has inner ones of its own


# ------------------------------------------------------------------------------- every combination, to the closed form


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination(family, scheme, dtype, checks):
    """Vmap against the closed form over many directions; the other evaluators against Vmap on the same ones."""
    problem = Quadratic()
    params = problem.params(dtype)
    num = 3_000 if family in ADAPTED else 30_000
    seed = checks.seed()
    base = zero_order(FAMILIES[family], scheme, sigma=problem.sigma, evaluator="vmap", seed=seed)(problem)
    estimate = base.replace(num_samples=num).estimate(params)
    value = problem(params)
    assert estimate.value == value
    assert estimate.value.dtype == value.dtype
    size = float(problem.gradient.norm())
    # What rounding of points, values and sums may add to the gradient, relative to its size.
    slack = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype] * size
    rows = estimate.coefficients[:, None] * noise(estimate.directions) / problem.sigma
    checks.mean(rows, problem.gradient, effect=(0.45 if num == 30_000 else 1.5) * size, slack=slack, what=family)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    mean = rows.mean(dim=0)
    torch.testing.assert_close(flat(estimate.grad), mean, rtol=0, atol=tolerance * float(rows.abs().mean(dim=0).max()))
    few = {name: base.replace(evaluator=name, num_samples=30).estimate(params) for name in ("loop", "vmap", "batched")}
    for other in few.values():
        assert other.value == value
        assert other.value.dtype == value.dtype
        assert {leaf.dtype for leaf in other.grad.values()} == {dtype}
        tolerances = {"rtol": 0, "atol": max(tolerance, 1e-12) * 10}
        torch.testing.assert_close(other.coefficients, few["vmap"].coefficients, **tolerances)
        torch.testing.assert_close(flat(other.grad), flat(few["vmap"].grad), **tolerances)
