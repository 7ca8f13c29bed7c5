"""Statistical checks with stated error rates.

A check compares the mean of independent samples with a closed form. All checks of the suite together raise a false
alarm with probability ``FALSE_ALARM`` at most (Bonferroni over ``FAMILY`` of them), and a check misses a deviation of
the size ``effect`` that it names with probability ``MISSED`` at most: it refuses to pass on samples too few for that.
"""

import math
import random
from statistics import NormalDist

import optree
import torch

FALSE_ALARM = 1e-6
MISSED = 1e-6
FAMILY = 4000

Z_FALSE = -NormalDist().inv_cdf(FALSE_ALARM / FAMILY / 2)
Z_MISSED = -NormalDist().inv_cdf(MISSED)

_MARGIN = 1.6  # the spread in the formula for the draws is a forecast, that in the check is what came


def draws(relative_variance, effect):
    """How many samples notice a deviation of ``effect``, both relative to the mean (the variance to its square)."""
    return math.ceil(_MARGIN * relative_variance * ((Z_FALSE + Z_MISSED) / effect) ** 2) + 400


class Checks:
    """The statistical checks of one test, and its seeds."""

    def __init__(self, base):
        self.base = base
        self.done = 0
        self.failed = 0
        self._random = random.Random(base)

    def seed(self):
        """A new seed for one estimate."""
        return self._random.getrandbits(63)

    def mean(self, samples, expected, *, effect, slack=1e-9, what=""):
        """Samples (n,) or (n, k) have this mean, and one that is off by ``effect`` would be noticed.

        ``slack`` is what rounding may add.
        """
        samples = samples.double().reshape(len(samples), -1)
        expected = torch.as_tensor(expected, dtype=torch.float64).expand(samples.shape[1:])
        effect = torch.as_tensor(effect, dtype=torch.float64).expand(samples.shape[1:])
        num, mean = len(samples), samples.mean(dim=0)
        centered = samples - mean
        deviation = centered.square().mean(dim=0).sqrt()
        error = deviation / math.sqrt(num)
        # Far in the tail the normal law is off where samples are skewed: the Cornish-Fisher term says by how much.
        skewness = (centered**3).mean(dim=0).abs() / deviation.clamp_min(1e-300) ** 3
        limit = (Z_FALSE + skewness.nan_to_num(posinf=0.0) * (Z_FALSE**2 - 1) / (6 * math.sqrt(num))) * error
        power = limit + Z_MISSED * error + slack
        wrong = (mean - expected).abs() > limit + slack
        self.done += len(mean)
        told = f"{what or 'mean'} (base seed {self.base}, n = {num}): expected {expected.tolist()}, got {mean.tolist()}"
        if wrong.any():
            self.failed += int(wrong.sum())
            raise AssertionError(f"{told}, z = {((mean - expected) / error).tolist()}")
        if (power > effect).any():
            self.failed += 1
            raise AssertionError(f"{told}: too few samples, these notice {power.tolist()} and not {effect.tolist()}")

    def trace(self, samples, mean, expected, *, effect, what="", slack=1e-9):
        """Samples (n, d) around their known mean have a covariance of this trace; ``effect`` is relative."""
        samples = samples.double().reshape(len(samples), -1)
        squares = (samples - torch.as_tensor(mean, dtype=torch.float64)).square().sum(dim=1)
        self.mean(squares, expected, effect=effect * expected, what=f"{what} trace", slack=slack)


def flat(tree):
    """A tree of tensors as one float64 vector, in the order of the leaves."""
    return torch.cat([leaf.double().reshape(-1) for leaf in optree.tree_leaves(tree)])


def noise(directions):
    """All directions as one float64 matrix."""
    # Copies: what `noise` returns is valid until its next call.
    return torch.cat([directions.noise(lo, hi)[0].to(torch.float64, copy=True) for lo, hi in directions.blocks()])


def per_direction(estimate, sigma):
    """What each direction alone would give, (N, size), checked to have the estimate's gradient as its mean."""
    rows = estimate.coefficients[:, None] * noise(estimate.directions) / sigma
    eps = torch.finfo(estimate.directions.space.dtype).eps
    size = rows.abs().mean(dim=0).amax()
    # Thousands of terms of one sign are summed one after the other, each sum rounded.
    torch.testing.assert_close(rows.mean(dim=0), flat(estimate.grad), rtol=0, atol=float(2e4 * eps * size))
    return rows
