"""`check_distribution`: right families pass, and one that is wrong in one way fails by that."""

import inspect
import itertools

import pytest
import torch

import zograd
from zograd.diagnostics import check_distribution
from zograd.diagnostics.distribution.limits import student
from zograd.distributions import (
    Coordinate,
    Dense,
    Gaussian,
    Guided,
    Hadamard,
    LowRank,
    Orthogonal,
    Rademacher,
    Sobol,
    Sphere,
)

RIGHT = [
    Gaussian(),
    Rademacher(),
    Sphere(),
    Orthogonal(),
    Orthogonal(lengths="sqrt_d"),
    Hadamard(),
    Sobol(),
    Coordinate(),
    LowRank(rank=1),
    Guided(torch.eye(12)[:, :3] + 0.1, 0.25),
]


@pytest.mark.parametrize("family", RIGHT, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize("shape", [(4, 3), [(2, 3), (6,)]], ids=["leaf", "leaves"])
def test_right_families_pass(family, shape):
    report = check_distribution(family, shape)
    assert report, str(report)
    assert report.dim == 12
    assert all(finding.worst <= 1 for finding in report.findings)


@pytest.mark.parametrize("family", [Gaussian(), Orthogonal(), Coordinate()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("shape", [1, (2,), (200,)], ids=str)
def test_right_families_pass_at_every_size(family, shape):
    assert check_distribution(family, shape, dtype=torch.float64)


class Changed(Dense):
    """A Gaussian family with a fault."""

    gaussian_marginals = True

    def __init__(self, fault):
        self.fault = fault

    def fill(self, out, generator):
        out.normal_(generator=generator)
        if self.fault == "shifted":
            out.add_(0.05)
        elif self.fault == "wide":
            out.mul_(1.03)
        elif self.fault == "signs":
            out.sign_()
        elif self.fault == "correlated":
            out[1:] += 0.05 * out[:-1].clone()

    def draw(self, space, noise, seed, block):
        super().draw(space, noise, 7 if self.fault == "one seed" else seed, 0 if self.fault == "one block" else block)
        if self.fault == "one wide value":
            noise[0][:, 2] *= 1.1
        elif self.fault == "forgetful":
            noise[0].add_(torch.rand(()), alpha=1e-3)

    def dot(self, space, noise, vector):
        return super().dot(space, noise, vector) * (1.001 if self.fault == "dot" else 1)

    def add_sum(self, space, noise, c, out):
        return super().add_sum(space, noise, c.flip(0) if self.fault == "sum" else c, out)


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("shifted", "mean"),
        ("wide", "covariance"),
        ("correlated", "covariance"),
        ("one wide value", "covariance"),
        ("signs", "fourth_moment"),
        ("one seed", "independence"),
        ("one block", "independence"),
        ("forgetful", "replay"),
        ("dot", "agreement"),
        ("sum", "agreement"),
    ],
)
def test_a_fault_is_found_by_its_name(fault, finding):
    report = check_distribution(Changed(fault), (20,))
    assert not report
    assert getattr(report, finding).ok is False
    assert getattr(report, finding).worst > 1
    assert finding.replace("_", " ") in report.summary()
    assert "WRONG" in str(report)
    assert check_distribution(Changed(None), (20,))


class Misstated(Guided):
    """Guided directions that say their covariance is another one."""

    def covariance(self, space, vector):
        return vector


def test_the_covariance_is_compared_with_its_statement():
    basis = torch.randn(30, 2)
    assert check_distribution(Guided(basis, 0.5), (30,)).covariance.ok
    assert not check_distribution(Misstated(basis, 0.5), (30,)).covariance.ok


def test_users_samplers():
    assert check_distribution(torch.distributions.Uniform(-(3**0.5), 3**0.5), (40, 3))
    wide = check_distribution(lambda shape: 1.1 * torch.randn(shape), (40,))
    assert wide.covariance.ok is False
    assert wide.mean.ok
    counter = itertools.count()
    kept = check_distribution(lambda shape: torch.full(shape, 1.5**0.5 * (next(counter) % 3 - 1)), (40,))
    assert kept.replay.ok is None
    assert not kept.covariance.ok  # all values of a direction are the same


def test_a_sampler_that_seems_to_be_replayable_is_seen_through():
    """Drawn twice under one key an even number of times, a period of two looks like a function of the key."""
    counter = itertools.count()
    report = check_distribution(lambda shape: torch.randn(shape).abs() * (next(counter) % 2 * 2 - 1), (40,))
    assert report.replay.ok is False


def test_the_numbers():
    assert check_distribution(Rademacher(), (50,)).kurtosis == pytest.approx(1.0)
    assert check_distribution(Gaussian(), (50,)).kurtosis == pytest.approx(3.0, abs=0.05)
    assert check_distribution(Sphere(), (4,)).kurtosis == pytest.approx(3 * 4 / 6, abs=0.05)  # 3 d / (d + 2)
    report = check_distribution(Gaussian(), (50,))
    assert 0.3 < report.slowdown < 30
    assert report.directions == 256 * 32
    text = str(report)
    for word in ("Gaussian()", "mean", "covariance", "fourth moment", "replay", "independence", "0.0001"):
        assert word in text
    assert report.findings[0] is report.mean


@pytest.mark.slow
@pytest.mark.parametrize("family", [Rademacher(), Sphere()], ids=lambda f: type(f).__name__)
def test_the_false_alarm_rate_is_what_it_says(family, monkeypatch):
    """At 5 % a family, 60 reports: more than 10 false alarms have a probability below 1e-4."""
    monkeypatch.setattr(inspect.getmodule(check_distribution), "FALSE_ALARM", 0.05)
    alarms = sum(not check_distribution(family, (8,), seed=1000 * k) for k in range(60))
    assert alarms <= 10


def test_students_quantile():
    """Against tables of Student's law."""
    assert student(1.959964, 30) == pytest.approx(2.042272, rel=2e-4)
    assert student(2.575829, 20) == pytest.approx(2.845340, rel=1e-3)
    assert student(3.290527, 120) == pytest.approx(3.373454, rel=1e-4)


def test_it_leaves_the_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_distribution(Sobol(), (5,))
    check_distribution(lambda shape: torch.randn(shape), (100,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: check_distribution(Gaussian, (3,)), TypeError, r"`check_distribution\(distribution=...\)` must be an"),
        (lambda: check_distribution(3, (3,)), TypeError, r"`check_distribution\(distribution=...\)` .*got int 3"),
        (
            lambda: check_distribution(torch.distributions.Normal(0.0, 0.1), (3,)),
            ValueError,
            "must have mean 0 and variance 1",
        ),
        (lambda: check_distribution(None, (3, 0)), ValueError, r"`check_distribution\(shape=...\)` .*got \(3, 0\)"),
        (lambda: check_distribution(None, (3.0,)), TypeError, r"`check_distribution\(shape=...\)` must hold integers"),
        (lambda: check_distribution(None, "ab"), TypeError, r"`check_distribution\(shape=...\)` must hold integers"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_none_is_the_default_of_zero_order():
    assert check_distribution(None, 4).name == str(zograd.zero_order()(lambda x: x.sum()).options.distribution)
