"""Shaping: pure functions of the values."""

import pytest
import torch

from zograd import NonFiniteError, Scheme, zero_order
from zograd.shaping import leave_one_out


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
