"""Objectives with closed forms, none of them symmetric: a symmetric one hides errors of sign and order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from zograd import ANTITHETIC, FORWARD, FOURTH_ORDER, NAIVE, zero_order
from zograd.distributions import Dense

SCHEMES = (NAIVE, FORWARD, ANTITHETIC, FOURTH_ORDER)

# The class of `estimate.directions`, for tests that need directions and no estimate.
Directions = type(zero_order(seed=0)(torch.sum).estimate(torch.zeros(1)).directions)


def adapted(distribution):
    """Return what an estimate makes of its ``distribution=``."""
    return zero_order(distribution)(torch.sum).options.distribution


def phi(z):
    """The density of the standard normal law."""
    return NormalDist().pdf(z)


def Phi(z):
    """The distribution function of the standard normal law."""
    return NormalDist().cdf(z)


@dataclass(frozen=True)
class Scalar:
    """A function of one number with its Gaussian smoothing: the closed forms hold at ``x`` for the radius ``sigma``."""

    name: str
    x: float
    sigma: float
    fn: Callable
    smoothed: Callable  # s -> f_s(x)
    gradient: Callable  # s -> its derivative
    variances: dict  # by scheme, of one direction's estimate

    def value(self):
        return float(self.fn(torch.tensor(self.x, dtype=torch.float64)))

    def mean(self, scheme):
        """The mean of the scheme's estimate, each pair of offsets having a smoothing of its own."""
        pairs = zip(scheme.weights, scheme.offsets, strict=True)
        return math.fsum(w * c * self.gradient(abs(c) * self.sigma) for w, c in pairs if c)

    def moments(self, scheme):
        """Mean, variance and the relative variance of the square, by numerical integration over the normal density."""
        e = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
        density = torch.exp(-e.square() / 2)
        density /= density.sum()
        pairs = zip(scheme.weights, scheme.offsets, strict=True)
        estimates = sum(w * self.fn(self.x + c * self.sigma * e) for w, c in pairs) * e / self.sigma
        mean = float((density * estimates).sum())
        squares = (estimates - mean).square()
        variance = float((density * squares).sum())
        return mean, variance, float((density * squares.square()).sum()) / variance**2 - 1


def _linear(a=-1.7, b=0.6, x=0.9, s=0.7):
    c = a * x + b
    base = 2 * a**2
    variances = {NAIVE: base + c**2 / s**2, FORWARD: base, ANTITHETIC: base, FOURTH_ORDER: base}
    return Scalar("linear", x, s, lambda x: a * x + b, lambda s: c, lambda s: a, variances)


def _quadratic(h=-1.4, x=1.1, s=0.6):
    g, c = h * x, h * x**2 / 2
    base = 2 * g**2
    forward = base + 15 * h**2 * s**2 / 4
    variances = {NAIVE: forward + c**2 / s**2 + 3 * h * c, FORWARD: forward, ANTITHETIC: base, FOURTH_ORDER: base}
    return Scalar("quadratic", x, s, lambda x: h * x**2 / 2, lambda s: c + h * s**2 / 2, lambda s: g, variances)


def _cubic(x=0.9, s=0.5):
    antithetic = 18 * x**4 + 72 * x**2 * s**2 + 96 * s**4
    forward = antithetic + 135 * x**2 * s**2
    variances = {
        NAIVE: forward + x**6 / s**2 + 18 * x**4,
        FORWARD: forward,
        ANTITHETIC: antithetic,
        FOURTH_ORDER: 18 * x**4,  # its cubic terms cancel
    }
    smoothed = lambda s: x**3 + 3 * x * s**2  # noqa: E731
    return Scalar("cubic", x, s, lambda x: x**3, smoothed, lambda s: 3 * x**2 + 3 * s**2, variances)


def _absolute(x=0.4, s=0.7):
    smoothed = lambda s: x * (2 * Phi(x / s) - 1) + 2 * s * phi(x / s)  # noqa: E731
    return Scalar("absolute", x, s, lambda x: abs(x), smoothed, lambda s: 2 * Phi(x / s) - 1, {})


def _step(x, s=0.8):
    z = x / s
    gradient = lambda s: phi(x / s) / s  # noqa: E731
    square = gradient(s) ** 2
    naive = (Phi(z) - z * phi(z)) / s**2 - square
    variances = {
        NAIVE: naive,
        # Below the step the center's value is zero, and forward is naive.
        FORWARD: (1 - Phi(z) + z * phi(z)) / s**2 - square if x > 0 else naive,
        ANTITHETIC: (1 - Phi(abs(z)) + abs(z) * phi(z)) / (2 * s**2) - square,
    }
    side = "above" if x > 0 else "below"
    return Scalar(f"step {side}", x, s, lambda x: (x > 0) * 1.0, lambda s: Phi(x / s), gradient, variances)


SCALARS = (_linear(), _quadratic(), _cubic(), _absolute(), _step(0.5), _step(-0.3))


class Quadratic:
    """x'Hx/2 + b'x + c0, on one tensor or a tree of three leaves, two of equal shape; also on a leading axis of points.

    Its closed forms are traces of the covariance of one direction's estimate.
    """

    H = torch.tensor(
        [
            [1.2, 0.3, -0.5, 0.1, 0.2],
            [0.3, -0.7, 0.4, 0.0, -0.3],
            [-0.5, 0.4, 0.9, 0.2, 0.1],
            [0.1, 0.0, 0.2, 0.5, -0.4],
            [0.2, -0.3, 0.1, -0.4, 1.5],
        ],
        dtype=torch.float64,
    )
    b = torch.tensor([0.5, -1.2, 0.8, 0.3, -0.4], dtype=torch.float64)
    c0 = 0.7
    x = torch.tensor([0.25, -0.5, 1.0, 0.75, -0.25], dtype=torch.float64)  # exact in bfloat16
    sigma = 0.5
    d = 5

    def __init__(self, *, curved=True):
        self.hessian = self.H if curved else torch.zeros_like(self.H)

    def params(self, dtype=torch.float64):
        x = self.x.to(dtype)
        return {"first": x[0:2].clone(), "second": x[2:4].clone(), "third": x[4].clone()}

    def __call__(self, params):
        x = params
        if isinstance(params, dict):
            x = torch.cat([params["first"], params["second"], params["third"].unsqueeze(-1)], dim=-1)
        x = x.float() if x.dtype == torch.bfloat16 else x
        H, b = self.hessian.to(x), self.b.to(x)
        return ((x @ H) * x).sum(dim=-1) / 2 + (x * b).sum(dim=-1) + self.c0

    @property
    def gradient(self):
        return self.hessian @ self.x + self.b

    @property
    def value(self):
        return float(self(self.params()))

    def trace(self, family, scheme):
        """The trace of the covariance for ``"gaussian"``, ``"rademacher"`` or ``"sphere"`` directions."""
        g2, trace = float(self.gradient.square().sum()), float(self.hessian.trace())
        d, s, c, frobenius = self.d, self.sigma, self.value, float(self.hessian.square().sum())
        antithetic = (d + 1 if family == "gaussian" else d - 1) * g2
        if scheme in (ANTITHETIC, FOURTH_ORDER):
            return antithetic
        # E (e'He)^2 |e|^2
        square = {
            "gaussian": (d + 4) * (trace**2 + 2 * frobenius),
            "rademacher": d * (trace**2 + 2 * (frobenius - float(self.hessian.diagonal().square().sum()))),
            "sphere": d**2 / (d + 2) * (trace**2 + 2 * frobenius),
        }[family]
        forward = antithetic + s**2 / 4 * square
        level = (d + 2 if family == "gaussian" else d) * c * trace
        return forward if scheme is FORWARD else forward + d * c**2 / s**2 + level


class Cubic:
    """sum_k a_k x_k^3: its estimates tell the fourth moments of directions apart."""

    a = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64)
    x = torch.tensor([0.5, 1.0, -0.75], dtype=torch.float64)
    d = 3

    def __call__(self, x):
        return (self.a.to(x) * x**3).sum(dim=-1)

    def antithetic(self, sigma, fourth_moment):
        """The mean of the antithetic estimate."""
        return self.a * (3 * self.x.square() + sigma**2 * fourth_moment)


ROWS = 16


class Exact(Dense):
    """The rows of the Hadamard matrix of 16: with 16 of them, the mean of eps eps^T is the identity."""

    def fill(self, out, generator):
        raise NotImplementedError

    def draw(self, space, noise, seed, block):
        i = torch.arange(ROWS)
        parity = sum((i[:, None] & i[None, :]) >> bit & 1 for bit in range(4)) % 2
        assert space.size <= ROWS
        noise[0].copy_((1 - 2 * parity)[: len(noise[0]), : space.size])


EXACT = {"distribution": Exact(), "method": "antithetic", "num_samples": ROWS, "sigma": 0.5}
"""Options whose gradient of a quadratic is exact up to rounding."""
