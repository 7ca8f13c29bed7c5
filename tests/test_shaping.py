"""Shaping: pure functions of the values."""

import pickle

import pytest
import torch

from zograd import NonFiniteError, Scheme, zero_order
from zograd.distributions import Gaussian, Hadamard, Orthogonal, Sobol
from zograd.shaping import centered_ranks, leave_one_out, standardize, top_directions


@pytest.mark.parametrize("shape", [(2, 1), (5, 1), (7, 2), (4, 4)])
def test_leave_one_out_subtracts_the_mean_of_the_others(shape):
    values = torch.randn(shape, dtype=torch.float64) + 3
    kept = values.clone()
    expected = torch.stack([row - torch.cat([values[:i], values[i + 1 :]]).mean() for i, row in enumerate(values)])
    torch.testing.assert_close(leave_one_out(values), expected)
    assert torch.equal(values, kept)


def test_leave_one_out_is_the_mean_baseline_without_its_shrinkage():
    values = torch.randn(9, 1, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(values) * (8 / 9), values - values.mean())


def test_leave_one_out_needs_two_directions():
    with pytest.raises(ValueError, match="`num_samples` must be >= 2, got 1"):
        leave_one_out(torch.ones(1, 1))
    with pytest.raises(ValueError, match="`num_samples` must be at least 2"):
        zero_order(num_samples=1, shaping=leave_one_out)


def options(**changes):
    return {"num_samples": 6, "sigma": 0.5, "seed": 3, **changes}


x = torch.tensor([0.4, -1.1, 0.8], dtype=torch.float64)
a = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def fn(x):
    return (a * x).sum() + 40.0


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_a_shaping_sees_all_values_without_the_center_in_float64(evaluator):
    seen = []

    def record(values):
        seen.append(values.clone())
        return values

    forward = zero_order(**options(method="forward", shaping=record, evaluator=evaluator))(fn)
    antithetic = zero_order(**options(method="antithetic", shaping=record, evaluator=evaluator))(fn)
    coefficients = forward.estimate(x).coefficients
    assert antithetic.estimate(x.float()).value == fn(x.float())
    assert [(tuple(s.shape), s.dtype) for s in seen] == [((6, 1), torch.float64), ((6, 2), torch.float64)]
    # With the center's value taken off, which is the side's whole coefficient here.
    torch.testing.assert_close(seen[0][:, 0], coefficients)


@pytest.mark.parametrize("method", ["forward", "antithetic", "fourth_order"])
def test_a_baseline_changes_nothing_where_the_weights_sum_to_zero(method):
    plain = zero_order(**options(method=method))(fn).estimate(x)
    if method == "forward":  # it is left with the mean of the others' differences, which is a baseline of its own
        shaped = zero_order(**options(method=method, shaping=lambda v: v))(fn).estimate(x)
    else:
        shaped = zero_order(**options(method=method, shaping=leave_one_out))(fn).estimate(x)
    torch.testing.assert_close(shaped.coefficients, plain.coefficients)
    torch.testing.assert_close(shaped.grad, plain.grad)


@pytest.mark.parametrize("num", [2, 6, 70_000])
def test_naive_with_leave_one_out_does_not_depend_on_the_level(num):
    """Also where the sum has more than one block, all of which have to wait for the last value."""
    shaped = zero_order(**options(num_samples=num, shaping=leave_one_out, evaluator="vmap"))
    high, low = shaped(fn).estimate(x), shaped(lambda x: (a * x).sum() - 7.0).estimate(x)
    torch.testing.assert_close(high.grad, low.grad, rtol=0, atol=1e-9)
    assert high.value == fn(x)  # the value is never shaped


def test_the_weights_apply_to_what_the_shaping_returns():
    scheme = Scheme((1.0, -2.0), (0.2, -0.4))
    marks = torch.arange(12, dtype=torch.float64).view(6, 2)
    estimate = zero_order(**options(method=scheme, shaping=lambda v: marks))(fn).estimate(x)
    torch.testing.assert_close(estimate.coefficients, 0.2 * marks[:, 0] - 0.4 * marks[:, 1])


@pytest.mark.parametrize(
    ("shaping", "message"),
    [
        (lambda v: v.sum(dim=1), r"must keep the shape of the values, \(6, 1\), got \(6,\)"),
        (lambda v: v.tolist(), r"must keep the shape of the values, \(6, 1\), got list"),
    ],
)
def test_a_shaping_that_changes_the_shape_is_refused(shaping, message):
    with pytest.raises(ValueError, match=message):
        zero_order(**options(shaping=shaping))(fn).estimate(x)


def test_a_shaping_is_for_one_value():
    with pytest.raises(ValueError, match=r"shaping=...\)` is for objectives of one value, got the shape \(3,\)"):
        zero_order(**options(shaping=leave_one_out))(lambda x: x * 2).estimate(x)


def test_values_are_checked_before_they_are_shaped():
    calls = []
    spoiled = zero_order(**options(shaping=calls.append))(
        lambda x: x.sum().log() if len(calls) else x.sum() * torch.nan
    )
    with pytest.raises(NonFiniteError, match="non-finite"):
        spoiled.estimate(x)
    assert not calls


# ------------------------------------------------------------------------------------------ ranks, deviations, the best


def test_centered_ranks_are_even_and_give_equal_values_the_mean_of_their_ranks():
    values = torch.tensor([[3.0, 1.0], [3.0, 9.0], [3.0, -1.0]], dtype=torch.float64)
    expected = torch.tensor([[3, 1], [3, 5], [3, 0]], dtype=torch.float64) / 5 - 0.5  # ranks 2, 3 and 4 share 3
    torch.testing.assert_close(centered_ranks(values), expected)
    assert float(centered_ranks(torch.randn(50, 2)).sum()) == pytest.approx(0, abs=1e-12)
    several = torch.randn(40, 2).double()
    numbers = several.flatten().argsort().argsort().double() / 79 - 0.5
    torch.testing.assert_close(centered_ranks(several).flatten(), numbers)


@pytest.mark.parametrize("shaping", [centered_ranks, standardize, top_directions(3), top_directions(3, largest=True)])
@pytest.mark.parametrize("level", [0.0, 0.1, 1e12])
def test_equal_values_give_exactly_zero(shaping, level):
    assert not shaping(torch.full((7, 2), level, dtype=torch.float64)).any()
    flat = zero_order(**options(method="antithetic", shaping=shaping))(lambda x: 0 * x.sum() + level)
    assert not flat.estimate(x).grad.any()


def test_standardize_has_mean_zero_and_deviation_one():
    shaped = standardize(torch.randn(9, 2, dtype=torch.float64) * 7 + 1e3)
    torch.testing.assert_close(shaped.mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(shaped.std(correction=0), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("largest", [False, True])
def test_top_directions_is_the_update_of_ars(largest):
    """Algorithm 2 of the paper, written out: the mean over the k best of the difference, over the deviation."""
    values = torch.randn(8, 2, dtype=torch.float64)
    eps = torch.randn(8, 3, dtype=torch.float64)
    sign = 1 if largest else -1
    order = sorted(range(8), key=lambda i: max(sign * values[i]), reverse=True)[:3]
    used = values[order]
    expected = sum((used[m, 0] - used[m, 1]) * eps[i] for m, i in enumerate(order)) / (3 * used.std(correction=0))
    shaped = top_directions(3, largest=largest)(values)
    torch.testing.assert_close((shaped[:, :1] - shaped[:, 1:]).mul(eps).mean(dim=0), expected)


def test_ranks_are_blind_to_monotone_transformations_and_to_the_size():
    """What the documentation says they change."""
    ranked = zero_order(**options(method="antithetic", shaping=centered_ranks))
    grad = ranked(fn).estimate(x).grad
    torch.testing.assert_close(ranked(lambda x: 100 * (fn(x) / 40).exp()).estimate(x).grad, grad, rtol=0, atol=0)
    scaled = zero_order(**options(method="antithetic", shaping=standardize))
    once, hundred = scaled(fn).estimate(x).grad, scaled(lambda x: 100 * fn(x)).estimate(x).grad
    torch.testing.assert_close(once, hundred)


def test_the_rank_estimate_points_along_a_linear_gradient_whatever_its_size():
    """Its mean is a / |a| times a number of N alone; off the axis it is noise of 20 000 directions, z < 5 in each."""
    a = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    ranked = zero_order(Gaussian(), "antithetic", num_samples=20_000, shaping=centered_ranks, seed=1, evaluator="vmap")
    small, large = (ranked(lambda x, k=k: k * (a @ x)).estimate(0 * x).grad for k in (1.0, 1e6))
    torch.testing.assert_close(small, large, rtol=0, atol=0)
    # u+ - u- is 2 Phi(z) - 1, z the direction's first entry: the mean of half of it times z is 1 / (2 sqrt(pi)).
    torch.testing.assert_close(small, torch.tensor([0.28209, 0, 0]).double(), rtol=0, atol=5 * 0.29 / 141)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shaping": centered_ranks, "num_samples": 1, "method": "naive"}, "`num_samples` must be at least 2"),
        ({"shaping": standardize, "num_samples": 1, "method": "forward"}, "`num_samples` must be at least 2"),
        ({"shaping": top_directions(7)}, r"shaping=top_directions\(7\), num_samples=6.*k must not exceed"),
        ({"shaping": top_directions(2), "method": "naive"}, "needs a scheme whose weights sum to zero"),
    ],
)
def test_a_shaping_that_could_not_work_is_refused_before_anything_is_evaluated(settings, message):
    with pytest.raises(ValueError, match=message):
        zero_order(**options(**settings))


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (True, TypeError), (2.0, TypeError)])
def test_top_directions_keeps_a_whole_number(k, error):
    with pytest.raises(error, match=r"`top_directions\(k=...\)` must be"):
        top_directions(k)


@pytest.mark.parametrize("shaping", [centered_ranks, standardize])
def test_one_value_has_nothing_to_be_compared_with(shaping):
    with pytest.raises(ValueError, match="there must be at least 2, got 1"):
        shaping(torch.ones(1, 1))


def test_top_directions_shows_itself_and_pickles():
    shaping = top_directions(4, largest=True)
    assert repr(shaping) == "top_directions(4, largest=True)"
    assert pickle.loads(pickle.dumps(shaping)) == shaping


@pytest.mark.parametrize("family", [Hadamard(), Sobol()], ids=repr)
@pytest.mark.parametrize("shaping", [leave_one_out, centered_ranks, standardize])
@pytest.mark.parametrize("method", ["naive", "forward"])
def test_a_baseline_must_not_know_the_sign_of_a_direction(family, shaping, method):
    """All rows of a Hadamard matrix agree in their first value: the mean would take its whole gradient away."""
    with pytest.raises(ValueError, match=r"tell each other's signs, .* Use `Orthogonal\(\)` or `Gaussian\(\)`"):
        zero_order(family, method, num_samples=4, shaping=shaping)
    zero_order(family, "antithetic", num_samples=4, shaping=shaping)


@pytest.mark.statistics
@pytest.mark.parametrize("method", ["naive", "forward"])
@pytest.mark.parametrize("lengths", ["chi", "sqrt_d"])
@pytest.mark.parametrize("num", [2, 5, 7])
def test_leave_one_out_keeps_the_mean_of_orthogonal_directions(lengths, method, num, checks):
    """A direction of a frame may be turned round without the others, so that their mean does not know its sign."""
    settings = zero_order(Orthogonal(lengths), method, num_samples=num, shaping=leave_one_out, evaluator="batched")
    slope = torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0], dtype=torch.float64)
    decorated = settings(lambda x: x @ slope + 4)
    rows = [decorated.replace(seed=checks.seed()).estimate(torch.zeros_like(slope)).grad for _ in range(1000)]
    samples = torch.stack(rows)
    checks.mean(samples, slope, effect=float(0.5 * samples.std(dim=0).amax()))


@pytest.mark.parametrize("shaping", [standardize, top_directions(2)])
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_the_size_of_the_values_changes_nothing(shaping, size):
    """Their squares leave the range of float64: the deviation came out infinite, and the gradient zero."""
    values = torch.tensor([[1.0, 4.0], [2.0, -1.0], [0.5, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(shaping(values * size), shaping(values))
