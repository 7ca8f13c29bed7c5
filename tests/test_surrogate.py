"""A surrogate as control variate: less noise, the same mean, however wrong it is."""

import pickle

import pytest
import torch

import zograd
from zograd import NonFiniteError, zero_order
from zograd.distributions import Gaussian, LowRank, Orthogonal, Rademacher, Sobol
from zograd.shaping import centered_ranks

D = 6
SLOPE = torch.linspace(-1, 2, D, dtype=torch.float64)
X = torch.full((D,), 0.4, dtype=torch.float64)
SIGMA = 0.3
TARGET = SLOPE + 3 * X**2 + 3 * SIGMA**2


def fn(x):
    return (SLOPE * x + x**3).sum(dim=-1)


def close(x):
    return (SLOPE * x + 1.2 * x**2).sum(dim=-1)


def wrong(x):
    return (2 * x.cos() - 3 * x**2).sum(dim=-1) + 5


SURROGATES = {"close": close, "wrong": wrong, "the function itself": fn}
METHODS = ["naive", "forward", "antithetic", "fourth_order"]


def decorated(surrogate, distribution=None, method="antithetic", num=8, function=fn, **changes):
    settings = {"num_samples": num, "sigma": SIGMA, "seed": 2, **changes}
    return zero_order(distribution, method, surrogate=surrogate, **settings)(function)


def terms(found, surrogate, method):
    """What each direction adds, of fn and of the surrogate, straight from the definition."""
    scheme = zograd.schemes.SCHEMES[method]
    eps = found.directions.noise(0, len(found.directions))[0].clone()
    gradient = torch.func.grad(surrogate)
    part = torch.zeros_like(eps)
    for i, row in enumerate(eps):
        for c, w in zip(scheme.offsets, scheme.weights, strict=True):
            point = X + SIGMA * c * row
            part[i] += w * c * gradient(point) - w * surrogate(point) * row / SIGMA
    return found.coefficients[:, None] * eps / SIGMA, part


def fitted(a, b):
    """The factor from some directions, and one more of which it is 1."""
    if not len(a):
        return 1.0
    trust = b.square().sum() / len(b)
    centered = b - b.mean(dim=0)
    return (trust - (a * centered).sum()) / (trust + centered.square().sum())


# ------------------------------------------------------------------------------------------------------ the definition


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num", [1, 2, 5, 8])
@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES.keys())
def test_is_its_definition(surrogate, num, method):
    """Each half of the directions has the factor that fits the other one best."""
    found = decorated(surrogate, method=method, num=num).estimate(X)
    a, b = terms(found, surrogate, method)
    even, odd = fitted(a[1::2], b[1::2]), fitted(a[::2], b[::2])
    expected = (a.sum(dim=0) + even * b[::2].sum(dim=0) + odd * b[1::2].sum(dim=0)) / num
    torch.testing.assert_close(found.grad, expected)


def test_groups_share_a_factor():
    """Orthogonal blocks: halves of whole blocks, whose sums the factor is fitted to."""
    num = 4 * D + 2
    found = decorated(close, Orthogonal(), num=num).estimate(X)
    a, b = ([part.sum(dim=0) for part in rows.split(D)] for rows in terms(found, close, "antithetic"))
    a, b = torch.stack(a), torch.stack(b)
    even, odd = fitted(a[1::2], b[1::2]), fitted(a[::2], b[::2])
    expected = (a.sum(dim=0) + even * b[::2].sum(dim=0) + odd * b[1::2].sum(dim=0)) / num
    torch.testing.assert_close(found.grad, expected)


@pytest.mark.parametrize("evaluator", ["vmap", "batched", zograd.evaluators.Vmap(chunk_size=3)])
@pytest.mark.parametrize("method", METHODS)
def test_any_evaluator_gives_the_same(evaluator, method):
    one_by_one = decorated(close, method=method, num=9).estimate(X)
    together = decorated(close, method=method, num=9, evaluator=evaluator).estimate(X)
    torch.testing.assert_close(together.grad, one_by_one.grad)
    torch.testing.assert_close(together.standard_error(), one_by_one.standard_error())


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_it_may_write_to_its_arguments_as_fn_may(evaluator):
    def writing(x):
        x.mul_(1.2)
        return close(x)

    expected = decorated(lambda x: close(1.2 * x), evaluator=evaluator).estimate(X).grad
    torch.testing.assert_close(decorated(writing, evaluator=evaluator).estimate(X).grad, expected)


def test_trees_with_a_radius_for_each_leaf_and_leaves_that_it_does_not_use():
    sigma = {"b": 0.1, "a": 0.5}
    tree = {"b": X[:2].clone(), "a": X[2:].view(2, 2).clone()}
    both = decorated(
        lambda t: 3 * t["a"].sum(), function=lambda t: 3 * t["a"].sum() + t["b"].sum(), sigma=sigma, num=64
    )
    found = both.estimate(tree)
    torch.testing.assert_close(found.grad["a"], torch.full((2, 2), 3.0, dtype=torch.float64), rtol=0.2, atol=0)
    assert found.standard_error()["a"].max() < 0.2
    assert found.standard_error()["b"].min() > 0.01


def test_backward_and_the_transforms_see_it():
    fn_ = decorated(close)
    grad = fn_.estimate(X).grad
    x = X.clone().requires_grad_()
    fn_(x).backward()
    assert torch.equal(x.grad, grad)
    torch.testing.assert_close(torch.func.grad(fn_)(X), grad)


def test_the_product_with_a_cotangent_is_that_of_the_gradient():
    found = decorated(close).estimate(X)
    torch.testing.assert_close(found.vjp(torch.tensor(2.0)), 2 * found.grad)


def test_the_second_derivative_is_that_of_the_values():
    vector = torch.ones_like(X)
    torch.testing.assert_close(decorated(close).estimate(X).hvp(vector), decorated(None).estimate(X).hvp(vector))


# ------------------------------------------------------------------------------------------------- what it promises


@pytest.mark.statistics
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num", [1, 2, 7])
def test_the_mean_is_the_same_however_wrong_it_is(method, num, checks):
    """Also with so few directions that the factors are mostly noise."""
    settings = decorated(wrong, method=method, num=num, evaluator="batched")
    samples = torch.stack([settings.replace(seed=checks.seed()).estimate(X).grad for _ in range(1500)])
    spread = samples.std(dim=0).amax()
    target = SLOPE + 3 * X**2 if method == "fourth_order" else TARGET
    checks.mean(samples, target, effect=float(0.4 * spread), what=f"{method}, N = {num}")


@pytest.mark.statistics
@pytest.mark.parametrize("distribution", [Orthogonal(), Sobol()], ids=["orthogonal", "sobol"])
def test_the_mean_is_the_same_for_every_family_with_gaussian_marginals(distribution, checks):
    settings = decorated(wrong, distribution, num=5, evaluator="batched")
    samples = torch.stack([settings.replace(seed=checks.seed()).estimate(X).grad for _ in range(1500)])
    checks.mean(samples, TARGET, effect=float(0.4 * samples.std(dim=0).amax()))


def test_a_close_one_takes_most_of_the_noise_off():
    """The figure of the closed form, d = N = 50: a relative error of 1.0 falls below .02."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(50, dtype=torch.float64, generator=generator)
    x = torch.full((50,), 0.3, dtype=torch.float64)

    def errors(surrogate):
        settings = decorated(
            surrogate, function=lambda x: x @ slope + 0.3 * (x**3).sum(dim=-1), num=50, evaluator="batched", sigma=0.2
        )
        target = slope + 0.9 * (x**2 + 0.2**2)
        found = [settings.replace(seed=seed).estimate(x).grad for seed in range(40)]
        return sum((g - target).square().sum() for g in found) / 40 / target.square().sum()

    assert 0.8 < errors(None) < 1.2
    assert errors(lambda x: x @ slope) < 0.05
    assert errors(lambda x: x @ slope + 0.25 * (x**2).sum(dim=-1)) < 0.02


@pytest.mark.parametrize("num", [10, 40])
def test_a_useless_one_costs_little(num):
    """Mean squared errors over 200 estimates, each about 10 % of their deviation: at most a tenth more for N = 40."""

    def error(surrogate):
        settings = decorated(surrogate, num=num, evaluator="batched")
        found = [settings.replace(seed=seed).estimate(X).grad for seed in range(200)]
        return sum((g - TARGET).square().sum() for g in found) / 200

    assert error(wrong) < (1.1 if num == 40 else 1.4) * error(None)


@pytest.mark.statistics
@pytest.mark.parametrize("distribution", [Gaussian(), Orthogonal()], ids=["gaussian", "orthogonal"])
@pytest.mark.parametrize("surrogate", [close, wrong])
def test_its_error_bars_are_true(distribution, surrogate, checks):
    """Two standard errors hold the target in 93 to 97 %; see test_error_bars for the rate of false alarms."""
    num = 64 if distribution.independent else 40 * D
    settings = decorated(surrogate, distribution, num=num, evaluator="batched")
    found = [settings.replace(seed=checks.seed()).estimate(X) for _ in range(400)]
    inside = torch.stack([(e.grad - TARGET).abs() < 2 * e.standard_error() for e in found]).double().mean()
    assert 0.93 < inside < 0.97
    assert all(e.snr() > 1 and -1 <= e.split_half_cosine() <= 1 for e in found)


@pytest.mark.parametrize("method", ["forward", "antithetic"])
def test_it_sees_the_random_numbers_that_fn_saw(method):
    """A coarse simulator with the seeds of the fine one takes their common noise off, too."""
    drawn = {"fn": [], "surrogate": []}

    def noisy(name):
        def function(x):
            drawn[name].append((float(x.detach().sum()), float(torch.rand(())), zograd.current_seed()))
            return fn(x)

        return function

    decorated(noisy("surrogate"), function=noisy("fn"), method=method).estimate(X)
    points = len(drawn["fn"]) if method == "forward" else len(drawn["fn"]) - 1  # it needs no center there
    assert len(drawn["surrogate"]) == points
    assert set(drawn["surrogate"]) <= set(drawn["fn"])


def test_nothing_outside_is_changed():
    state = torch.random.get_rng_state()
    x = X.clone().requires_grad_()
    version = x._version
    decorated(lambda x: close(x) + torch.rand(())).estimate(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert x._version == version
    assert x.grad is None


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": Rademacher()}, "needs Gaussian marginals, which Rademacher.. has not: use `Gaussian"),
        ({"distribution": LowRank()}, "needs Gaussian marginals"),
        ({"shaping": centered_ranks}, "a shaping changes what is estimated"),
        ({"batch_dim": 0}, "got batch_dim=0"),
    ],
)
def test_settings_without_an_unbiased_estimate_are_refused(settings, message):
    with pytest.raises(ValueError, match=r"`zero_order\(surrogate=...\)` has no unbiased estimate here: .*" + message):
        decorated(close, **settings)


def test_inference_mode_has_no_gradient_for_it():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"needs its gradient: use `torch.no_grad\(\)`"):
        decorated(close).estimate(X)
    with torch.no_grad():
        without = decorated(close).estimate(X).grad
    assert torch.equal(without, decorated(close).estimate(X).grad)


def test_it_is_a_function():
    with pytest.raises(TypeError, match=r"`zero_order\(surrogate=...\)` must be None or a function"):
        decorated(3.0)


@pytest.mark.parametrize(
    ("surrogate", "error", "message"),
    [
        (lambda x: 2 * x, ValueError, r"must return a tensor of shape .*, as `fn` does, got the shape \((8, )?6,?\)"),
        (lambda x: 3.0, ValueError, r"must return a tensor, got float 3\.0"),
        (lambda x: x.detach().sum(), ValueError, "must be differentiable by autograd"),
        (lambda x: (x - X).abs().sum().sqrt() * torch.nan, NonFiniteError, "non-finite value or gradient"),
    ],
)
@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_what_is_no_approximation_is_told(surrogate, error, message, evaluator):
    with pytest.raises(error, match=message):
        decorated(surrogate, evaluator=evaluator).estimate(X)


def test_fn_has_one_value():
    with pytest.raises(ValueError, match=r"surrogate=...\)` is for objectives of one value, got the shape \(6,\)"):
        decorated(close, function=lambda x: 2 * x).estimate(X)


def test_it_pickles_with_the_options():
    options = decorated(close).options
    assert pickle.loads(pickle.dumps(options)) == options


def test_dropped_directions_would_unbalance_its_halves():
    with pytest.raises(ValueError, match=r"failures=Drop\(.*\)`: the halves of the directions .* must be whole"):
        decorated(close, failures=zograd.failures.Drop())
