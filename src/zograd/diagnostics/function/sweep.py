"""Estimates over a range of sigma: what they are off by, and how noisy they are."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zograd.diagnostics.function.subject import OutOfBudgetError
from zograd.distributions.directions import project
from zograd.errors import ZeroOrderWarning
from zograd.estimate.estimate import estimate
from zograd.estimate.settings import Settings
from zograd.estimate.statistics import Length, length_of
from zograd.evaluators import Batched, Evaluator, Loop, Vmap
from zograd.schemes import ANTITHETIC, FORWARD, NAIVE, Scheme

if TYPE_CHECKING:
    from zograd.diagnostics.function.subject import Subject
    from zograd.distributions.base import Distribution
    from zograd.distributions.directions import Directions

SCHEMES: tuple[Scheme, ...] = (FORWARD, ANTITHETIC, NAIVE)  # in the order of preference, where all else is equal
# Groups: a variance over few of them is known badly where there are few parameters, and many cost time where many.
_GROUPS, _MOST = 16, 256
_SMALL = 1 << 20  # values up to which there are more groups
_VALUES = 1 << 27  # of all groups' gradients together, at most


@dataclass(frozen=True)
class Samples:
    """Antithetic values around the parameters, of which every other scheme's coefficients can be made."""

    sigma: float
    radii: tuple[float, ...]
    directions: Directions
    center: float
    values: torch.Tensor  # (N, 2): at theta + sigma eps and theta - sigma eps

    def __len__(self) -> int:
        return len(self.values)

    @property
    def varies(self) -> bool:
        """Whether any value is another than the center's."""
        return bool((self.values != self.center).any())

    def coefficients(self, scheme: Scheme) -> torch.Tensor:
        """What a scheme makes of them, over sigma: an estimate of the slope along each direction, (N,)."""
        plus, minus = self.values.unbind(1)
        if scheme is ANTITHETIC:
            return (plus - minus) / (2 * self.sigma)
        return (plus - self.center if scheme is FORWARD else plus) / self.sigma

    def slopes(self, gradient: torch.Tensor) -> torch.Tensor:
        """The same for a linear function of that flat gradient, without any error."""
        space, family = self.directions.space, self.directions.distribution
        leaves = zip(space.split(gradient.to(space.dtype)), self.radii, strict=True)
        scaled = space.join(tuple(leaf * radius**2 for leaf, radius in leaves))
        dots = project(self.directions, self.radii, scaled)[:, 0].cpu()
        return dots * (len(self) / family.scale(space) / self.sigma)


def sample(
    subject: Subject, distribution: Distribution, radii: tuple[float, ...], num: int, seed: int, *, vmapped: bool
) -> Samples:
    """Evaluate ``num`` antithetic pairs.

    Returns:
        The values.

    Raises:
        OutOfBudgetError: if that takes more evaluations than are left.
    """
    if 2 * num + 1 > subject.left:
        raise OutOfBudgetError
    inner: Evaluator = Batched() if subject.batched else Vmap() if vmapped else Loop()
    settings = Settings(distribution, ANTITHETIC, num, radii, inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroOrderWarning)  # small radii are part of the question
        made = estimate(subject.objective(), settings, subject.params, subject.space, seed)
    return Samples(max(radii), radii, made.directions, made.center.item(), made.values.cpu())


def square_of(samples: Samples, one: Length, *, smooth: bool) -> Length:
    """Return the best guess at the vector's length.

    Where it does not show in the products of groups, and the function is smooth at this sigma, the mean square of the
    slopes serves: of a linear function that is what they are.

    Returns:
        That, or what was given.
    """
    if one.resolved or not smooth:
        return one
    squares = samples.coefficients(ANTITHETIC).square()
    return one.replace(float(squares.mean()), float(squares.std()) / math.sqrt(len(squares)))


def measure(samples: Samples, coefficients: torch.Tensor) -> Length:
    """Group the directions and estimate by each group alone.

    Args:
        samples: whose directions.
        coefficients: slopes along them, (N,).

    Returns:
        What the groups' estimates tell.
    """
    size = samples.directions.space.size
    num = min(len(samples), max(4, min(_MOST, _VALUES // size)), max(_GROUPS, _SMALL // size))
    bounds = [len(samples) * k // num for k in range(num + 1)]
    means = torch.stack([_mean(samples, coefficients, lo, hi) for lo, hi in itertools.pairwise(bounds)])
    return length_of(means, len(samples))


def _mean(samples: Samples, coefficients: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
    """The estimate by directions ``lo`` to ``hi`` alone, flat, in float64; each block is drawn once."""
    d, total, at = samples.directions, None, lo
    space, family = d.space, d.distribution
    c = coefficients.to(space.device, space.dtype)[:, None]
    with space.full_precision():
        while at < hi:
            end = min(hi, (at // d.block + 1) * d.block)
            total = family.add_sum(space, d.noise(at, end), c[at:end], total)
            at = end
    assert total is not None
    factor = family.scale(space) / (hi - lo) * samples.sigma
    leaves = zip(space.split(total.double()), samples.radii, strict=True)
    return torch.cat([(leaf * (factor / radius)).reshape(-1) for leaf, radius in leaves]).cpu()
