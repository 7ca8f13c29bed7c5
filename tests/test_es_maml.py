"""Estimates inside an objective, as ES-MAML has them, against closed forms."""

import pytest
import torch

from zograd import zero_order

DIM, CURVATURE, RATE, SIGMA = 6, 1.5, 0.2, 0.1
GOAL = torch.linspace(-1.0, 2.0, DIM, dtype=torch.float64)
START = torch.tensor([0.5, 1.0, -2.0, 0.0, 3.0, -1.5], dtype=torch.float64)
GRADIENT = CURVATURE * (START - GOAL)


def cost(policies, goals):
    return CURVATURE / 2 * (policies - goals).square().sum(dim=-1)


def inner(num):
    """Each policy is a slice with directions of its own."""
    options = {"method": "antithetic", "num_samples": num, "sigma": SIGMA, "evaluator": "batched", "batch_dim": 0}
    return zero_order(**options)(cost)


def adapted_cost(num):
    step = inner(num)

    def fn(policies):
        goals = GOAL.expand_as(policies)
        return cost(policies - RATE * step.estimate(policies, goals).grad, goals)

    return fn


@pytest.mark.statistics
@pytest.mark.parametrize("num", [1, 5])
def test_es_maml_has_the_value_and_the_gradient_of_its_closed_form(checks, num):
    """E f(U(x)) = f(x) [(1 - a h)^2 + (a h)^2 (d + 1) / K] for one antithetic step of K pairs."""
    bracket = (1 - RATE * CURVATURE) ** 2 + (RATE * CURVATURE) ** 2 * (DIM + 1) / num
    fn, draws = adapted_cost(num), 60_000
    options = {"method": "antithetic", "num_samples": draws, "sigma": SIGMA, "evaluator": "batched"}
    estimate = zero_order(seed=checks.seed(), **options)(fn).estimate(START)
    samples = estimate.coefficients.unsqueeze(1) * estimate.directions.noise(0, draws)[0] / SIGMA  # one a direction
    checks.mean(samples, bracket * GRADIENT, effect=0.2 * float(GRADIENT.abs().max()), what="gradient")
    torch.manual_seed(checks.seed())
    values = fn(START.repeat(draws, 1))
    checks.mean(values, bracket * cost(START, GOAL), effect=0.1 * float(cost(START, GOAL)), what="value")


@pytest.mark.statistics
@pytest.mark.parametrize("num", [2, 8])
def test_maml_by_create_graph_has_the_gradient_of_its_closed_form(checks, num):
    """g [(1 - a h)^2 + (a h)^2 (2 d + 2) / N], g = h (x - c), with N directions for the step and its derivative.

    The step's gradient and Hessian share their directions, so that they correlate: with r = |eps|^2, a chi-square, the
    mean of the Hessian's estimate times the gradient's is h g (N - 1 + E[(r - d) (r - 1) r] / 2 d) / N, which is h g (N
    - 1 + 2 d + 3) / N. The estimate at the adapted point is on directions of its own.
    """
    bracket = (1 - RATE * CURVATURE) ** 2 + (RATE * CURVATURE) ** 2 * (2 * DIM + 2) / num
    estimated, tasks = inner(num), 20_000
    torch.manual_seed(checks.seed())
    policies = START.repeat(tasks, 1).requires_grad_()  # each row is a sample: its directions are its own
    goals = GOAL.expand(tasks, DIM)
    (step,) = torch.autograd.grad(estimated(policies, goals).sum(), policies, create_graph=True)
    estimated(policies - RATE * step, goals).sum().backward()
    checks.mean(policies.grad, bracket * GRADIENT, effect=0.3 * float(GRADIENT.abs().max()), what="gradient")


def test_both_sides_of_a_pair_adapt_along_the_same_directions():
    """A function that is odd after adaptation has exact differences only then."""
    seen = []

    def fn(policies):
        goals = GOAL.expand_as(policies)
        estimate = step.estimate(policies, goals)
        seen.append(estimate.directions.noise(0, 3)[0].clone())
        return cost(policies - RATE * estimate.grad, goals)

    step = inner(3)
    zero_order(method="antithetic", num_samples=4, sigma=SIGMA, evaluator="batched", seed=5)(fn).estimate(START)
    center, plus, minus = seen
    assert torch.equal(plus, minus)
    assert plus.shape == (3, 4 * DIM)
    rows = plus.view(3 * 4, DIM)
    assert len({tuple(row.tolist()) for row in rows}) == 12, "each policy has directions of its own"
    assert not any(torch.equal(row, other) for row in rows for other in center.view(-1, DIM))
