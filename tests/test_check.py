"""`zograd.check`: what it finds in functions that are wrong in one way each, and that it leaves all as it was."""

import math
import pickle
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

import zograd
from zograd import ANTITHETIC, zero_order
from zograd._base.trees import Space
from zograd.diagnostics import check
from zograd.diagnostics.function.advice import orthogonal
from zograd.distributions import Gaussian, Rademacher

X = torch.linspace(-1, 1.5, 12)
SLOPE = torch.arange(1.0, 13.0)


def smooth(x):
    return (x.sin() * SLOPE).sum()


class Counted:
    """Counts the points that it is asked for, in a loop only."""

    def __init__(self, fn):
        self.fn = fn
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return float(self.fn(x.detach()))


# --------------------------------------------------------------------------------------------- what a function is like


def test_a_good_function_has_no_problems():
    report = check(smooth, X)
    assert report
    assert report.calls.deterministic
    assert report.calls.repeatable
    assert report.calls.draws == ()
    assert report.calls.changed == ()
    assert not report.calls.writes_to_point
    assert report.calls.value == pytest.approx(float(smooth(X)))
    assert report.calls.seconds > 0
    assert report.pickling.works
    assert report.vectorized.works
    assert report.vectorized.same
    assert report.problems == report.notes == ()


def test_one_that_draws_from_torch_repeats_itself_with_one_random_state():
    report = check(lambda x: nn.functional.dropout(x, 0.5).sum(), X)
    assert not report.calls.deterministic
    assert report.calls.repeatable
    assert report.calls.draws == ("torch",)
    assert report.calls.deviation > 0
    assert report.vectorized.same  # under one random state
    assert "one luck" in report.autograd.error


@pytest.mark.parametrize(
    ("name", "draw"), [("numpy", lambda: np.random.randn()), ("python", lambda: random.gauss(0, 1))]
)
def test_one_that_draws_elsewhere_does_not(name, draw):
    report = check(lambda x: float(x.sum()) + 0.01 * draw(), X)
    assert not report.calls.repeatable
    assert report.calls.draws == (name,)
    assert report.noise.kind == "random"
    assert report.noise.level == pytest.approx(0.01, rel=0.9)
    assert report.noise_sigma > report.roundoff_sigma
    assert report.suggestion.method == "antithetic"
    assert report.suggestion.sigma >= report.noise_sigma
    assert any("current_seed" in note for note in report.notes)


def test_luck_from_the_current_seed_is_repeatable():
    report = check(lambda x: float(x.sum()) + random.Random(zograd.current_seed()).gauss(0, 9), X)
    assert not report.calls.deterministic
    assert report.calls.repeatable
    assert report.noise.level < 1e-5


log, total, table = [], 0, torch.zeros(3)


def careless(x, data, options):
    global total
    total += 1
    log.append(float(x.sum()))
    table.add_(1)
    data.mul_(1.5)
    options.append(1)
    x.add_(1)
    return x.sum()


def test_what_it_changes_is_named():
    data, options = torch.ones(2), [3]
    report = check(careless, X, data, options)
    for name in ("the global `log`", "the global `total`", "the global `table`", "argument 1", "argument 2"):
        assert name in report.calls.changed
    assert report.calls.writes_to_point
    assert not report
    assert "changes" in report.problems[0]
    assert torch.equal(table, torch.zeros(3))
    assert torch.equal(data, torch.ones(2))
    assert options == [3]
    assert torch.equal(X, torch.linspace(-1, 1.5, 12))


def test_closures_attributes_and_helpers_are_looked_at():
    seen = {"count": 0}

    def closing(x):
        seen["count"] += 1
        return x.sum()

    class Simulator:
        def __init__(self):
            self.steps = 0

        def run(self, x):
            self.steps += 1
            return x.sum()

    assert check(closing, X).calls.changed == ("`seen`, which it closes over",)
    assert check(Simulator().run, X).calls.changed == ("self",)
    assert check(lambda x: helper(x), X).calls.changed == ("the global `log`",)


def helper(x):
    log.append(1)
    return x.sum()


def test_pickling():
    assert check(smooth, X).pickling.works
    report = check(lambda x: smooth(x), X)
    assert not report.pickling.works
    assert "pickle" in report.pickling.error.lower()
    decorated = check(zero_order()(lambda x: x.sum()), X)
    assert "cannot be pickled" in decorated.pickling.error


class Forgets:
    """Pickles, but comes back as another function."""

    def __init__(self, scale):
        self.scale = scale

    def __reduce__(self):
        return Forgets, (1.0,)

    def __call__(self, x):
        return self.scale * x.sum()


def test_a_round_trip_that_changes_the_function_is_no_pickling():
    assert pickle.loads(pickle.dumps(Forgets(2.0))).scale == 1.0
    report = check(Forgets(2.0), X)
    assert not report.pickling.works
    assert "after a round trip" in report.pickling.error


def test_vmap_is_compared_value_by_value():
    def by_kind(x):
        return x.sum() * (2.0 if torch._C._functorch.is_batchedtensor(x) else 1.0)

    report = check(by_kind, X)
    assert report.vectorized.works
    assert not report.vectorized.same
    assert report.vectorized.difference == pytest.approx(1.0)
    assert report.suggestion.evaluator != "vmap"
    assert report  # nobody asked for vmap
    assert not check(zero_order(evaluator="vmap")(by_kind), X)
    assert not check(lambda x: float(x.sum()), X).vectorized.works


def test_the_noise_floor_of_arithmetic():
    """Values rounded to multiples of q have an error of deviation q / sqrt(12)."""
    q = 2.0**-10
    report = check(lambda x: float((x.double() @ SLOPE.double()).div(q).add(x.double()[0] * 1e7 % 1).round() * q), X)
    assert report.calls.repeatable
    assert report.noise.kind == "round-off"
    assert q / 8 < report.noise.level < q
    assert check(lambda x: 0.0 * x.sum(), X).noise.kind == "none"


def test_steps_are_not_called_rounding():
    report = check(lambda x: float(1 + (x.double() @ SLOPE.double()) * 1e7 % 1), X)
    assert report.noise.kind == "steps"
    assert "(steps)" in str(report)
    assert "limit of steps" in str(report)
    assert "round-off" not in str(report)


def test_a_slow_function_that_pickles_is_for_a_pool():
    report = check(slow, X, budget=120)
    assert report.suggestion.evaluator == "Pool"
    assert 2e-3 < report.calls.seconds < 0.1
    assert any("Pool" in reason for reason in report.suggestion.reasons)
    assert check(lambda x: slow(x), X, budget=120).suggestion.evaluator == "loop"


def slow(x):
    time.sleep(2e-3)
    return float(x.sum())


def test_a_fast_one_of_torch_operations_is_for_vmap(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.thread_time)  # what others do on this machine is not asked here
    assert check(smooth, X).suggestion.evaluator == "vmap"


# ------------------------------------------------------------------------------------------------- bias, variance and N


@pytest.mark.parametrize("known", [True, False], ids=["autograd", "values"])
def test_the_bias_is_that_of_the_closed_form(known):
    """f = sum x^3: grad f_s - grad f = 3 s^2 in every coordinate."""

    def cubic(x):
        value = (x**3).sum()
        return value if known else float(value.detach())

    x = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    report = check(cubic, x, budget=20_000)
    assert report.autograd.differentiable == known
    length = float((3 * x**2).norm())
    for radius in report.sweep[-3:]:
        assert radius.bias == pytest.approx(3 * radius.sigma**2 * math.sqrt(6) / length, rel=0.35)
    assert report.suggestion.sigma < report.sweep[-2].sigma


def test_the_deviation_is_that_of_the_closed_form():
    """Of a linear function (d + 1) |g|^2 is the variance of an antithetic direction."""
    report = check(lambda x: (x * SLOPE).sum(), X, budget=10_000)
    for radius in report.sweep[2:]:
        assert radius.deviation == pytest.approx(math.sqrt(13), rel=0.1)
    for method in ("forward", "antithetic"):
        assert report.needed[method].num_samples == pytest.approx(0.81 / 0.19 * 13, rel=0.1)
    assert report.needed["antithetic"].evaluations == pytest.approx(2 * 0.81 / 0.19 * 13 + 1, rel=0.1)
    assert report.suggestion.method == "forward"


@pytest.mark.parametrize(
    "fn", [smooth, lambda x: float((x.round() + (3 * x).round()).abs().sum())], ids=["sin", "step"]
)
def test_n_gives_the_cosine_that_it_promises(fn):
    report = check(fn, X, budget=4000)
    s = report.suggestion
    options = {"method": s.method, "sigma": s.sigma, "num_samples": s.num_samples}
    truth = zero_order(None, "antithetic", 0, 20_000, s.sigma, seed=1)(fn).estimate(X).grad
    grads = [zero_order(**options, seed=100 + k)(fn).estimate(X).grad for k in range(60)]
    cosine = torch.stack([torch.cosine_similarity(g, truth, dim=0) for g in grads]).mean()
    assert 0.86 < cosine < 0.94  # the deviation of the mean is .004


def test_a_level_makes_naive_hopeless():
    report = check(lambda x: 1000 + (x * SLOPE).sum(), X)
    assert report.needed["naive"].evaluations > 1000 * report.needed["forward"].evaluations


def test_curvature_makes_forward_worse_than_antithetic():
    report = check(zero_order(sigma=1.0)(lambda x: 50 * (x**2).sum() + x.sum()), torch.zeros(12))
    at = next(r for r in report.sweep if r.sigma == 1.0)
    forward = at.samples.coefficients(zograd.FORWARD)
    assert forward.var() > 100 * at.samples.coefficients(ANTITHETIC).var()


def test_the_roundoff_limit_follows_the_dtype():
    limits = {dtype: check(smooth, X.to(dtype)).roundoff_sigma for dtype in (torch.float64, torch.float32)}
    assert 1e7 < limits[torch.float32] / limits[torch.float64] < 1e10
    bfloat = check(lambda x: (x**2).sum(), X.bfloat16())
    assert 0.01 < bfloat.roundoff_sigma < 1
    assert bfloat.suggestion.sigma > bfloat.roundoff_sigma


def test_a_sigma_below_the_limit_is_a_problem():
    report = check(zero_order(method="antithetic", sigma=1e-8, num_samples=9)(lambda x: 100 + (x * SLOPE).sum()), X)
    assert not report
    assert any("sigma = 1e-08 is below" in problem for problem in report.problems)


def test_a_function_without_slopes_is_a_problem():
    report = check(lambda x: 0 * x.sum(), X)
    assert not report
    assert "same value at all points" in report.problems[0]
    assert report.suggestion.num_samples is None


def test_what_hides_from_autograd_is_noted():
    report = check(lambda x: (x.detach() * SLOPE).sum() + x[0], X)
    assert report.autograd.differentiable
    assert report.autograd.cosine < 0.9
    assert any("hides from autograd" in note for note in report.notes)
    right = check(smooth, X)
    assert right.autograd.cosine > 0.999
    assert right.autograd.scale == pytest.approx(1, abs=0.01)
    twice = check(Doubled.apply, X)
    assert abs(twice.autograd.scale - 0.5) < 4 * twice.autograd.scale_error < 0.25
    assert twice.autograd.cosine > 0.95


class Doubled(torch.autograd.Function):
    """A gradient that is twice the right one."""

    @staticmethod
    def forward(x):
        return (x * SLOPE).sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent * SLOPE


def test_a_staircase_is_not_differentiable():
    report = check(lambda x: (3 * x).round().sum(), X)
    assert not report.autograd.differentiable
    assert report.autograd.error == "autograd's gradient is zero"
    assert report.suggestion.sigma > 0.1


# --------------------------------------------------------------------------------------------- what can be handed to it


def test_a_decorated_function_is_judged_by_its_settings():
    decorated = zero_order(method="antithetic", num_samples=13, sigma=0.05)(lambda x: (x * SLOPE).sum())
    report = check(decorated, X, budget=8000)
    assert any(radius.sigma == 0.05 for radius in report.sweep)
    assert report.given_cosine == pytest.approx(math.sqrt(0.5), abs=0.05)  # N / (N + d + 1)
    assert report.distribution.name == "Gaussian()"
    wrong = check(decorated.replace(distribution=lambda shape: 2 * torch.randn(shape)), X)
    assert not wrong
    assert "covariance" in wrong.problems[0]


def test_families_with_a_covariance_of_their_own_are_compared_with_it():
    family = zograd.distributions.Guided(SLOPE[:, None] + torch.eye(12)[:, :1], alpha=0.2)
    report = check(zero_order(family, "antithetic", num_samples=12, sigma=0.01)(lambda x: (x * SLOPE).sum()), X)
    assert report
    assert report.autograd.scale == pytest.approx(1, abs=1e-3)
    assert max(radius.bias for radius in report.sweep[4:]) < 1e-3
    # Of a linear f: E|c eps|^2 = g.S g tr S + 2 g.S S g, and N for a cosine with S g.
    space = Space.of((X,))
    image = family.covariance(space, SLOPE)
    variance = SLOPE @ image * 12 + image @ image
    expected = 0.81 / 0.19 * float(variance / (image @ image))
    assert report.needed["antithetic"].num_samples == pytest.approx(expected, rel=0.35)


def test_dependent_families_are_measured_by_gaussian_directions():
    decorated = zero_order(zograd.distributions.Orthogonal(), "antithetic", num_samples=12)(smooth)
    report = check(decorated, X)
    assert any("Orthogonal" in note for note in report.notes)
    assert report.distribution


def test_modules_are_left_as_they_are():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))

        def forward(self, x):
            return self.net(x).abs().mean()

    torch.manual_seed(0)
    module, x = Loss(), torch.randn(20, 3)
    module.net[0].weight.requires_grad_(False)
    for fn in (module, zograd.nn.ZeroOrder(module, method="antithetic", sigma=0.1, num_samples=5)):
        before = {k: v.clone() for k, v in module.state_dict().items()}
        report = check(fn, x)
        assert report.dim == 4 + 8 + 5
        assert report.calls.draws == ("torch",)
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())


def test_modules_in_a_closure_are_left_as_they_are():
    model = nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def loss(x):
        out = model(x + torch.arange(24.0).view(2, 12).sin()).sum()
        out.backward()
        return out.detach()

    report = check(loss, X)
    assert "`model`, which it closes over" in report.calls.changed
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_random_states_are_left_as_they_are():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    check(lambda x: float(torch.rand(()) + np.random.rand() + random.random() + x.sum()), X)
    with pytest.raises(ZeroDivisionError, match="division"):
        check(lambda x: torch.rand(()).item() / 0, X)
    assert torch.equal(states[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(states[1], np.random.get_state(), strict=True))
    assert states[2] == random.getstate()


def test_trees_keywords_and_several_values():
    def residuals(data, params, *, scale=1.0):
        return scale * (data @ params["w"] + params["b"]).sin()

    params = {"w": torch.ones(3), "b": torch.zeros(1)}
    report = check(residuals, torch.eye(3), params, argnums=1, scale=2.0)
    assert report.dim == 4
    assert report.shape == (3,)
    assert report.autograd.cosine > 0.999
    assert check(residuals, torch.eye(3), params=params, argnums=1).dim == 4


def test_sigma_by_leaf_keeps_its_proportions():
    fn = zero_order(method="antithetic", sigma={"a": 0.1, "b": 0.02})(lambda p: (3 * p["a"] - p["b"]).sum())
    report = check(fn, {"a": torch.ones(2), "b": torch.ones(2)}, budget=10_000)
    assert any(radius.sigma == 0.1 for radius in report.sweep)
    assert report.autograd.scale == pytest.approx(1, abs=1e-3)
    # The variance of sum_k (g_k r_k e_k) e_l / r_l over l: (sum g^2 r^2) (sum 1 / r^2) + |g|^2.
    slopes, radii = torch.tensor([3.0, 3, -1, -1]), torch.tensor([1.0, 1, 0.2, 0.2])
    variance = (slopes * radii).square().sum() * radii.pow(-2).sum() + slopes.square().sum()
    at = next(radius for radius in report.sweep if radius.sigma == 0.1)
    assert at.deviation == pytest.approx(float(variance.sqrt() / slopes.norm()), rel=0.15)


def test_functions_that_use_autograd_inside():
    def after_a_step(x):
        (grad,) = torch.autograd.grad((x**3).sum(), x)
        return ((x - 0.1 * grad) ** 2).sum().detach()

    report = check(after_a_step, X)
    assert report.calls.deterministic
    assert not report.vectorized.works
    assert report.suggestion.num_samples < 200


def test_batched_functions():
    report = check(zero_order(evaluator="batched", sigma=0.1)(lambda x: (x * SLOPE).sum(dim=1)), X)
    assert report.suggestion.evaluator == "batched"
    assert report.suggestion.num_samples == pytest.approx(0.81 / 0.19 * 13, rel=0.3)


# ---------------------------------------------------------------------------------------------------- budget and errors


@pytest.mark.parametrize("budget", [120, 300, 1001])
def test_the_budget_holds(budget):
    fn = Counted(smooth)
    report = check(fn, X, budget=budget)
    assert fn.calls <= report.evaluations <= budget
    assert report.evaluations >= budget - 40


def test_what_fn_raises_comes_through():
    def broken(x):
        raise LookupError("no such file")

    with pytest.raises(LookupError, match="no such file"):
        check(broken, X)
    with pytest.raises(zograd.NonFiniteError, match=r"returned nan at the arguments"):
        check(lambda x: x.sum() * math.nan, X)
    with pytest.raises(TypeError, match="must return a tensor or a number"):
        check(lambda x: None, X)


def test_what_fn_raises_away_from_its_arguments_is_reported():
    def bounded(x):
        if x.abs().max() > 1.7:
            raise ValueError("out of range")
        return float((x * SLOPE).sum())

    report = check(bounded, X)
    assert report.sweep[-1].error == "ValueError: out of range"
    assert any("out of range" in note for note in report.notes)
    assert report.suggestion.sigma < 0.3
    assert report.suggestion.num_samples is not None


def test_a_point_without_a_finite_value_does_not_end_the_comparison_with_vmap():
    """Its values are compared, not judged: only an estimate has no use for them."""
    near = torch.linspace(0.1, 0.5, 3)

    def fails_far_away(x):
        return torch.where((x - near).norm() > 0.2, torch.nan, x.square().sum())

    report = check(zero_order(sigma=0.2)(fails_far_away), near)
    assert report.vectorized.works
    assert report.vectorized.same  # nan is nan both ways
    assert report.vectorized.difference < 1e-6
    assert report.vectorized.seconds > 0
    assert report.sweep[-1].error.startswith("NonFiniteError")
    assert report.suggestion.sigma < 0.2


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: check(smooth, X, budget=119), ValueError, r"`check\(budget=...\)` must be at least 120 .*119"),
        (
            lambda: check(smooth, X, budget=1e3),
            TypeError,
            r"`check\(budget=...\)` must be an integer, got float 1000.0",
        ),
        (lambda: check(smooth, X, seed=-1), ValueError, r"`check\(seed=...\)` must lie in .*-1"),
        (lambda: check(smooth, X, argnums=1), ValueError, r"`check\(argnums=1\)` must index the arguments of `smooth`"),
        (lambda: check(smooth, X, argnums="x"), TypeError, r"`check\(argnums=...\)` must be an integer, got str"),
        (lambda: check(3, X), TypeError, r"`check\(fn\)` must be a function, a decorated one or a module, got int 3"),
        (lambda: check(smooth, 3.0), ValueError, "no floating-point tensor to differentiate"),
        (lambda: check(smooth, X.to(torch.complex64)), TypeError, "must be dense and real, got a complex tensor"),
        (lambda: check(nn.ReLU(), X), ValueError, "the module ReLU has no trainable parameters"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_table_and_the_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    report = check(smooth, X)
    text = str(report)
    assert "\n" not in repr(report)
    for word in ("deterministic", "pickles", "noise floor", "round-off limit", "SUGGESTED", "N for cosine 0.9"):
        assert word in text
    hidden = str(check(lambda x: sum(float(value) for value in x), X))  # whose reasons are longer
    assert all(len(line) <= 100 for line in (*text.splitlines(), *hidden.splitlines()))
    axes = report.plot()
    assert axes.get_xscale() == axes.get_yscale() == "log"
    labels = axes.get_legend_handles_labels()[1]
    assert {"bias", "round-off limit", "suggested"} <= set(labels)
    assert report.plot(axes) is axes
    matplotlib.pyplot.close("all")


def test_the_table_names_the_sigma_that_the_others_are_compared_with():
    report = check(lambda x: float(smooth(x)), X)  # autograd has no say
    compared = [k for k, radius in enumerate(report.sweep) if radius.bias_limit == 0]
    rows = [line.partition("sigma ")[2] for line in str(report).splitlines() if "deviation of one" in line]
    assert len(compared) == 1
    assert [k for k, row in enumerate(rows) if "reference" in row] == compared
    assert "reference" not in str(check(smooth, X))
    exact = check(lambda x: float(x.detach().sum()), torch.zeros(1, dtype=torch.float64))  # equal at many sigmas
    assert str(exact).count("reference") == sum(radius.is_reference for radius in exact.sweep) == 1


def test_it_is_reproducible():
    first, again = check(smooth, X, seed=5), check(smooth, X, seed=5)
    assert first.sweep == again.sweep
    assert first.needed == again.needed
    other = check(smooth, X, seed=6)
    assert other.needed != first.needed


@pytest.mark.parametrize("dim", [10, 100])
def test_the_number_of_orthogonal_directions_is_the_closed_form(dim):
    """On a quadratic N of them have the error (d + 2) / N - 1, independent ones (d + 1) / N; .19 / .81 is wanted."""
    wanted = 0.19 / 0.81
    num = orthogonal((dim + 1) / wanted, dim)
    assert num <= dim
    assert (dim + 2) / num - 1 <= wanted < (dim + 2) / (num - 1) - 1
    noisy = orthogonal(10 * (dim + 1) / wanted, dim)  # whole frames
    frame = (10 * (dim + 1) + 1) / dim - 1
    assert noisy % dim == 0
    assert frame / (noisy // dim) <= wanted < frame / (noisy // dim - 1)


@pytest.mark.parametrize("distribution", [Gaussian(), Rademacher()], ids=repr)
def test_orthogonal_directions_are_named_where_they_take_fewer(distribution):
    """The closed form is for Gaussian directions."""
    decorated = zero_order(distribution, seed=0)(lambda x: (x * torch.arange(1.0, 31)).sum() + (x * x).sum())
    reasons = zograd.check(decorated, torch.ones(30)).suggestion.reasons
    assert any("with `Orthogonal()` directions N = " in reason for reason in reasons) is (distribution == Gaussian())


def test_random_numbers_of_its_own_are_not_vectorized():
    """One call of numpy's generator would give all rows the same noise, and the sweep would see none."""
    generator = np.random.default_rng(0)

    def noisy(x):
        return (x**2).sum() + 0.1 * generator.standard_normal()

    report = zograd.check(noisy, torch.ones(4), budget=200)
    assert not report.vectorized.works
    assert "one draw would serve all rows" in str(report)
    assert "vmap" not in str(report.suggestion.evaluator)
    assert zograd.check(lambda x: (x**2).sum() + 0.1 * torch.randn(()), torch.ones(4), budget=200).vectorized.works
