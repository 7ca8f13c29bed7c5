"""Estimates whose mean is known exactly: by enumerating all directions, or by quadrature. No chance anywhere."""

import itertools
import math

import pytest
import torch

from problems import SCHEMES, Quadratic
from zograd import ANTITHETIC, FORWARD, FOURTH_ORDER, NAIVE, zero_order
from zograd.distributions import Dense


class Listed(Dense):
    """The rows of a matrix as directions, in order."""

    def __init__(self, matrix, block):
        self.matrix = matrix
        self.block = block

    def rows(self, space, num):
        return self.block

    def fill(self, out, generator):
        raise AssertionError("the rows are listed")

    def draw(self, space, noise, seed, block):
        lo = block * self.block
        noise[0].copy_(self.matrix[lo : lo + len(noise[0])])


def all_signs(d, block=None):
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=d)), dtype=torch.float64)
    return {"distribution": Listed(signs, block or len(signs)), "num_samples": len(signs)}


def close(actual, expected, atol=2e-13):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def quadratic(d):
    """An asymmetric point, slope and (symmetric, indefinite) Hessian."""
    k = torch.arange(1, d + 1, dtype=torch.float64)
    hessian = torch.sin(k[:, None] * k) + torch.sin(k[:, None] * k).T + torch.diag(k / d)
    x, b = torch.cos(3 * k), torch.sin(k) - 0.2
    return (lambda x: x @ hessian @ x / 2 + b @ x + 0.3), x, hessian @ x + b, hessian


EVALUATORS = ["loop", "vmap", "batched"]


def evaluated(fn, evaluator):
    return torch.vmap(fn) if evaluator == "batched" else fn


# ------------------------------------------------------------------------------------------- signs, all of them


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("block", [1024, 100, 1])
def test_the_mean_over_all_signs_is_the_gradient_of_a_quadratic(scheme, evaluator, block):
    fn, x, gradient, _ = quadratic(10)
    options = {**all_signs(10, block), "method": scheme, "sigma": 0.7, "evaluator": evaluator}
    estimate = zero_order(**options)(evaluated(fn, evaluator)).estimate(x)
    close(estimate.grad, gradient)
    assert estimate.value == (torch.vmap(fn)(x.unsqueeze(0))[0] if evaluator == "batched" else fn(x))
    assert estimate.coefficients.shape == (1024,)
    assert estimate.evaluations == 1024 * len(scheme.sides) + 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_variance_over_all_signs_is_the_closed_form(scheme):
    d, sigma = 10, 0.7
    fn, x, g, H = quadratic(d)
    options = all_signs(d)
    estimate = zero_order(**options, method=scheme, sigma=sigma, evaluator="vmap")(fn).estimate(x)
    rows = estimate.coefficients[:, None] * options["distribution"].matrix / sigma
    trace = float((rows - g).square().sum(dim=1).mean())
    expected = (d - 1) * float(g.square().sum())
    if not scheme.order > 1:
        off_diagonal = float(H.square().sum() - H.diagonal().square().sum())
        expected += sigma**2 / 4 * d * (float(H.trace()) ** 2 + 2 * off_diagonal)
    if scheme is NAIVE:
        expected += d * float(fn(x)) ** 2 / sigma**2 + d * float(fn(x)) * float(H.trace())
    assert trace == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_on_cubes_the_scheme_sees_the_fourth_moment_of_signs(sigma):
    x = torch.tensor([0.5, -1.2, 0.9, 2.0], dtype=torch.float64)
    a = torch.tensor([1.0, -0.3, 0.7, 0.2], dtype=torch.float64)
    cubes = lambda x: (a * x**3).sum()  # noqa: E731
    for scheme in (NAIVE, FORWARD, ANTITHETIC):
        estimate = zero_order(**all_signs(4), method=scheme, sigma=sigma, evaluator="vmap")(cubes).estimate(x)
        close(estimate.grad, a * (3 * x.square() + sigma**2), atol=1e-12)
    fourth = zero_order(**all_signs(4), method=FOURTH_ORDER, sigma=sigma, evaluator="vmap")(cubes).estimate(x)
    close(fourth.grad, a * 3 * x.square(), atol=1e-12)


def test_every_leaf_gets_its_own_part():
    """Two leaves of equal shape, a number, two differentiated arguments and one that is not."""
    problem = Quadratic()
    params = problem.params()

    def fn(pair, factor, third):
        return factor * problem({"first": pair[0], "second": pair[1], "third": third["value"]})

    options = {**all_signs(5), "method": "antithetic", "argnums": (2, 0), "evaluator": "vmap"}
    sigma = ({"value": 0.25}, [0.5, 2.0])
    estimate = zero_order(**options, sigma=sigma)(fn).estimate(
        [params["first"], params["second"]], 3.0, {"value": params["third"]}
    )
    third, (first, second) = estimate.grad
    gradient = 3.0 * problem.gradient
    assert [tuple(leaf.shape) for leaf in (third["value"], first, second)] == [(), (2,), (2,)]
    close(torch.cat([first, second, third["value"].view(1)]), gradient)


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_each_slice_gets_its_own_gradient(batch_dim, evaluator):
    """Over all signs of both slices at once: what one slice does to the other's coefficient cancels exactly."""
    fn, _, _, _ = quadratic(3)
    x = torch.tensor([[0.3, -1.0, 0.5], [1.5, 0.2, -0.7]], dtype=torch.float64)
    expected = torch.stack([torch.func.grad(fn)(row) for row in x])
    options = {**all_signs(6), "method": "antithetic", "sigma": 0.4, "batch_dim": batch_dim, "evaluator": evaluator}
    by_slice = zero_order(**options)(lambda x: torch.vmap(fn, in_dims=batch_dim)(x).view([1] * batch_dim + [2]))
    estimate = by_slice.estimate(x if batch_dim == 0 else x.T.contiguous())
    close(estimate.grad if batch_dim == 0 else estimate.grad.T, expected)
    assert estimate.coefficients.shape == (64, *[1] * batch_dim, 2)


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_vector_outputs_contract_with_any_cotangent(evaluator):
    fn, x, _, _ = quadratic(4)
    outputs = lambda x: torch.stack([fn(x), (x * x[0]).sum(), x[1] - x[2]])  # noqa: E731
    estimate = zero_order(**all_signs(4), method="antithetic", evaluator=evaluator)(outputs).estimate(x)
    jacobian = torch.func.jacrev(outputs)(x)
    for cotangent in torch.tensor([[1.0, 0, 0], [0.3, -2.0, 0.7]], dtype=torch.float64):
        close(estimate.vjp(cotangent), cotangent @ jacobian)


def test_backward_is_the_estimate_times_the_cotangent():
    fn, x, gradient, _ = quadratic(6)
    decorated = zero_order(**all_signs(6), method="antithetic", sigma=0.3)(fn)
    x.requires_grad_()
    value = decorated(x)
    assert value == fn(x)
    (-2.5 * value).backward()
    close(x.grad, -2.5 * gradient)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("num", [1, 2, 16])
def test_evaluations_are_the_calls_that_fn_saw(scheme, num):
    calls = []

    def fn(x):
        calls.append(x.clone())
        return float(x.sum())

    x = torch.tensor([0.3, -0.8, 1.1, 2.0], dtype=torch.float64)
    estimate = zero_order(**{**all_signs(4), "num_samples": num}, method=scheme)(fn).estimate(x)
    assert estimate.evaluations == len(calls) == 1 + num * len(scheme.sides)
    assert estimate.failures == 0
    assert sum(torch.equal(call, x) for call in calls) == 1  # the center is evaluated once, and the plain call is it


# ------------------------------------------------------------------------------------------------------- quadrature


def hermite(nodes):
    """Nodes and weights for the standard normal law: the eigenvalues of the Jacobi matrix of Hermite polynomials."""
    side = torch.arange(1, nodes, dtype=torch.float64).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return points, vectors[0].square()


def by_quadrature(d, nodes=20):
    """A distribution whose weighted rows integrate polynomials exactly; the weights enter as a shaping."""
    points, weights = hermite(nodes)
    rows = torch.cartesian_prod(*[points] * d).view(-1, d)
    joint = torch.cartesian_prod(*[weights] * d).view(-1, d).prod(dim=1)
    return (
        rows,
        joint,
        {
            "distribution": Listed(rows, 37),
            "num_samples": len(rows),
            "shaping": lambda values: values * (joint * len(joint)).unsqueeze(1),
            "evaluator": "vmap",
        },
    )


FUNCTIONS = {
    "linear": (lambda x: -1.7 * x + 0.6, lambda x, s: -1.7),
    "square": (lambda x: -0.7 * x**2, lambda x, s: -1.4 * x),
    "cube": (lambda x: x**3, lambda x, s: 3 * x**2 + 3 * s**2),
    "fifth": (lambda x: x**5, lambda x, s: 5 * x**4 + 30 * x**2 * s**2 + 15 * s**4),
    "exponential": (lambda x: torch.exp(x), lambda x, s: math.exp(x + s**2 / 2)),
    "sine": (lambda x: torch.sin(x), lambda x, s: math.cos(x) * math.exp(-(s**2) / 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("sigma", [0.25, 0.6])
def test_the_mean_is_the_weighted_gradient_of_the_smoothings(name, scheme, sigma):
    fn, gradient = FUNCTIONS[name]
    x = torch.tensor([0.8], dtype=torch.float64)
    _, _, options = by_quadrature(1)
    estimate = zero_order(**options, method=scheme, sigma=sigma)(lambda x: fn(x[0])).estimate(x)
    pairs = zip(scheme.weights, scheme.offsets, strict=True)
    expected = math.fsum(w * c * gradient(0.8, abs(c) * sigma) for w, c in pairs if c)
    assert estimate.grad.item() == pytest.approx(expected, abs=1e-12)
    assert estimate.value == fn(x[0])


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_on_a_cube_antithetic_adds_three_sigma_squared_and_fourth_order_nothing(sigma):
    _, _, options = by_quadrature(1)
    x = torch.tensor([0.8], dtype=torch.float64)
    grads = [
        zero_order(**options, method=scheme, sigma=sigma)(lambda x: x[0] ** 3).estimate(x).grad.item()
        for scheme in (ANTITHETIC, FOURTH_ORDER)
    ]
    assert grads == pytest.approx([3 * 0.64 + 3 * sigma**2, 3 * 0.64], abs=1e-13)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_in_two_dimensions_mixed_terms_come_out(scheme):
    sigma = 0.5
    _, _, options = by_quadrature(2, nodes=8)
    x = torch.tensor([0.8, -0.3], dtype=torch.float64)
    fn = lambda x: x[0] ** 3 + 2 * x[0] ** 2 * x[1] - x[1]  # noqa: E731
    estimate = zero_order(**options, method=scheme, sigma=sigma)(fn).estimate(x)
    # Each smoothing adds s^2/2 times the gradient of the Laplacian, 6 x_0 + 4 x_1, and nothing more for cubes.
    moment = math.fsum(w * c**3 for w, c in zip(scheme.weights, scheme.offsets, strict=True))
    expected = torch.tensor([3 * 0.64 + 4 * 0.8 * -0.3, 2 * 0.64 - 1], dtype=torch.float64)
    close(estimate.grad, expected + moment * sigma**2 / 2 * torch.tensor([6.0, 4.0], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_trace_of_the_covariance_is_the_closed_form_of_gaussian_directions(scheme):
    fn, x, g, H = quadratic(3)
    sigma, d, c = 0.6, 3, float(fn(x))
    rows, joint, options = by_quadrature(3, nodes=6)
    plain = {**options, "shaping": None}
    estimate = zero_order(**plain, method=scheme, sigma=sigma)(fn).estimate(x)
    each = estimate.coefficients[:, None] * rows / sigma
    close(joint @ each, g, atol=1e-12)
    trace = float(joint @ (each - g).square().sum(dim=1))
    expected = (d + 1) * float(g.square().sum())
    if scheme.order == 1:
        expected += sigma**2 / 4 * (d + 4) * (float(H.trace()) ** 2 + 2 * float(H.square().sum()))
    if scheme is NAIVE:
        expected += d * c**2 / sigma**2 + (d + 2) * c * float(H.trace())
    assert trace == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scheme", [NAIVE, FORWARD, ANTITHETIC], ids=repr)
def test_on_a_circle_the_gradient_is_that_of_the_disk_smoothing(scheme):
    """Equal angles integrate trigonometric polynomials exactly; the target averages over the disk, radius sqrt(2) s."""
    angles = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16) + 0.1
    circle = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], dim=1)
    x, sigma = torch.tensor([0.8, -0.3], dtype=torch.float64), 0.5
    options = {"distribution": Listed(circle, 5), "num_samples": 16, "sigma": sigma, "method": scheme}
    estimate = zero_order(**options)(lambda x: x[0] ** 3 + 2 * x[0] ** 2 * x[1]).estimate(x)
    radius2 = 2 * sigma**2 / 4  # the mean of u_0^2 over the disk is a quarter of its radius squared
    expected = torch.tensor([3 * 0.64 + 4 * 0.8 * -0.3 + 3 * radius2, 2 * 0.64 + 2 * radius2], dtype=torch.float64)
    close(estimate.grad, expected)
