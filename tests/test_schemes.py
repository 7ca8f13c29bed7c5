"""Schemes: rows of numbers that check themselves."""

import math

import pytest
import torch

from problems import SCHEMES
from zograd import ANTITHETIC, FORWARD, FOURTH_ORDER, NAIVE, Scheme
from zograd.schemes import SCHEMES as NAMES

CENTRAL_OF_SIX = Scheme((1, -1, 2, -2, 3, -3), (3 / 4, -3 / 4, -3 / 20, 3 / 20, 1 / 60, -1 / 60))
ONE_SIDED = Scheme((0, 1, 2), (-1.5, 2, -0.5))


@pytest.mark.parametrize(
    ("scheme", "order", "uses_center", "is_difference", "sides"),
    [
        (NAIVE, 1, False, False, 1),
        (FORWARD, 1, True, True, 1),
        (ANTITHETIC, 2, False, True, 2),
        (FOURTH_ORDER, 4, False, True, 4),
        (CENTRAL_OF_SIX, 6, False, True, 6),
        (ONE_SIDED, 2, True, True, 2),
    ],
)
def test_derived_properties(scheme, order, uses_center, is_difference, sides):
    assert scheme.order == order
    assert scheme.uses_center is uses_center
    assert scheme.is_difference is is_difference
    assert len(scheme.sides) == sides
    assert 0.0 not in scheme.sides


@pytest.mark.parametrize("scheme", [*SCHEMES, CENTRAL_OF_SIX, ONE_SIDED], ids=repr)
def test_combine_differentiates_polynomials_up_to_its_order(scheme):
    x, h, degree = 0.7, 0.3, scheme.order
    # For a scheme that is no difference the value at x has to be zero.
    f = lambda t: t**degree + 2 * t - (0 if scheme.is_difference else x**degree + 2 * x)  # noqa: E731
    sides = torch.tensor([[f(x + h * c) for c in scheme.sides]], dtype=torch.float64)
    slope = scheme.combine(sides, torch.tensor(f(x), dtype=torch.float64)) / h
    assert slope.item() == pytest.approx(degree * x ** (degree - 1) + 2, abs=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_combine_is_the_weighted_sum(scheme):
    sides = torch.randn(7, len(scheme.sides), 2, 3, dtype=torch.float64)
    center = torch.randn(2, 3, dtype=torch.float64)
    weights = dict(zip(scheme.offsets, scheme.weights, strict=True))
    expected = sum(weights[c] * sides[:, j] for j, c in enumerate(scheme.sides)) + weights.get(0.0, 0.0) * center
    torch.testing.assert_close(scheme.combine(sides, center), expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_combine_has_the_same_bits_for_any_number_of_rows(scheme):
    sides, center = torch.randn(257, len(scheme.sides), dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    whole = scheme.combine(sides, center)
    for chunk in (1, 3, 100):
        assert torch.equal(torch.cat([scheme.combine(part, center) for part in sides.split(chunk)]), whole)


@pytest.mark.parametrize(
    ("offsets", "weights", "message"),
    [
        ((1.0, -1.0), (0.5,), "must have as many weights as offsets, got 1 and 2"),
        ((1.0, 1.0), (0.5, 0.5), "must not have an offset twice"),
        ((1.0, -1.0), (1.0, -1.0), r"must have sum\(weights \* offsets\) == 1, got 2.0"),
        ((1.0, -1.0), (-0.5, 0.5), r"must have sum\(weights \* offsets\) == 1, got -1.0"),
        ((), (), r"must have sum\(weights \* offsets\) == 1, got 0"),
        ((math.nan,), (1.0,), "must have finite numbers only"),
        ((1.0, 2.0), (math.inf, -math.inf), "must have finite numbers only"),
    ],
)
def test_what_is_no_difference_quotient_is_refused(offsets, weights, message):
    with pytest.raises(ValueError, match=message):
        Scheme(offsets, weights)


def test_schemes_are_values():
    assert Scheme((1, -1), (0.5, -0.5), name="ANTITHETIC") == ANTITHETIC
    assert hash(Scheme((1, -1), (0.5, -0.5), name="ANTITHETIC")) == hash(ANTITHETIC)
    assert repr(FORWARD) == "FORWARD"
    assert repr(ONE_SIDED) == "Scheme(offsets=(0.0, 1.0, 2.0), weights=(-1.5, 2.0, -0.5))"
    with pytest.raises(AttributeError, match="cannot assign to field 'weights'"):
        NAIVE.weights = (2.0,)


def test_names():
    assert [NAMES[name] for name in ("naive", "forward", "antithetic", "fourth_order")] == list(SCHEMES)
