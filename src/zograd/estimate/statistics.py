r"""How far an estimate may be from its mean, told from the values that it was made of.

An estimate is a mean over groups of directions that do not depend on each other: single directions, or whole blocks of
a family whose directions complement each other. How far the groups' own estimates lie from their mean tells the error.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from zograd.distributions.base import Dense
from zograd.distributions.directions import contract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zograd.distributions.directions import Directions

    Halves = Callable[[], tuple[torch.Tensor, torch.Tensor]]

_TOGETHER = 1 << 20  # values of rows that are squared together
_FOLDS = 32  # parts of a jackknife: each costs a sum over all directions


@dataclass(frozen=True)
class ErrorBars:
    """The error of an estimate.

    Args:
        mean: the estimate, of shape (size,).
        variance: that of each of its entries, in float64: squares of small numbers leave the range of float32.
        groups: the independent groups of directions it was made of.
        halves: makes the estimates of two independent halves of the groups.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    groups: Groups
    halves: Halves

    @cached_property
    def noise(self) -> float:
        """The squared length of the error."""
        return float(self.variance.sum())

    @cached_property
    def signal(self) -> float:
        """The squared length of what is estimated: the estimate's without the noise in it."""
        return max(0.0, float(self.mean.double().square().sum()) - self.noise)

    @property
    def snr(self) -> float:
        """The length of what is estimated over the length of the error."""
        if self.noise:
            return math.sqrt(self.signal / self.noise)
        return math.inf if self.signal else 0.0

    def needed(self, cosine: float) -> float:
        """Directions, in whole groups, with which this cosine to the target is expected."""
        if not self.signal:
            return math.inf
        groups = self.groups.count * self.noise / self.signal * cosine**2 / (1 - cosine**2)
        return max(1, math.ceil(groups - 1e-9)) * self.groups.size

    def split_half_cosine(self) -> float:
        """The cosine between the estimates of the halves."""
        first, second = (half.double() for half in self.halves())
        lengths = float(first.norm() * second.norm())
        return float(first @ second) / lengths if lengths else 0.0


class HasErrorBars(Protocol):
    """A part of an estimate that knows the error of the whole."""

    def error_bars(self) -> ErrorBars:
        """Return the error of the gradient."""


@dataclass(frozen=True)
class Groups:
    """The groups of directions of an estimate that are independent of each other.

    Args:
        directions: the directions.
        sigma: the smoothing radius of each leaf.
        alive: a mask of the directions that were not dropped; None for all.
    """

    directions: Directions
    sigma: tuple[float, ...]
    alive: torch.Tensor | None = None

    @cached_property
    def size(self) -> int:
        """Directions in a group; a last one may have fewer."""
        return self.directions.distribution.group(self.directions.space, self.directions.num)

    @cached_property
    def count(self) -> int:
        """How many groups there are."""
        return -(-len(self.directions) // self.size) if self.alive is None else int(self.alive.sum())

    def check(self, typed: str) -> None:
        """Refuse to tell an error from one group, or from groups of which a part was dropped.

        Raises:
            ValueError: if there is one only, or directions that depend on others were dropped.
        """
        if self.alive is not None and self.size > 1:
            raise ValueError(
                f"{typed}: directions were dropped, and those of {self.directions.distribution} depend on each other, "
                "so that the parts which are left cannot be compared. Use `Gaussian()`, or `Retry` in place of `Drop`."
            )
        if self.count < 2:
            raise ValueError(
                f"{typed} compares independent parts of the estimate with each other: `num_samples` must be more than "
                f"the {self.size} direction{'s' * (self.size > 1)} that make one part of "
                f"{self.directions.distribution}, got {len(self.directions) if self.alive is None else self.count}."
            )

    def odd(self) -> torch.Tensor:
        """A mask of the directions in every other group."""
        return torch.arange(len(self.directions)) // self.size % 2 == 1

    def sums(self, weights: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Sums over each group of weight times direction over sigma, several groups at a time.

        Args:
            weights: of shape (N, slices), in the compute dtype.

        Yields:
            The first direction, and rows of shape (groups, size); valid until the next.
        """
        d = self.directions
        factor = d.distribution.scale(d.space) / self.radii(weights)
        if self.size == 1:
            step = max(1, _TOGETHER // d.space.size)
            for start, end in d.blocks():
                stop = min(end, len(d))
                for lo in range(start, stop, step):
                    hi = min(lo + step, stop)
                    yield lo, self.rows(lo, hi) * self._by_value(weights[lo:hi]) * factor
            return
        for lo in range(0, len(d), self.size):
            hi, total = min(lo + self.size, len(d)), None
            for start in range(lo, hi, d.block):
                total = d.add_sum(start, weights[start : min(start + d.block, hi)], total)
            assert total is not None
            yield lo, (total * factor).unsqueeze(0)

    def held(self, lo: int) -> int:
        """How many directions the group that begins at ``lo`` has."""
        return min(self.size, len(self.directions) - lo)

    def among(self, kept: torch.Tensor) -> int:
        """How many directions of a mask were not dropped."""
        return int((kept if self.alive is None else kept & self.alive).sum())

    def rows(self, lo: int, hi: int) -> torch.Tensor:
        """Directions as rows of a matrix."""
        d = self.directions
        if isinstance(d.distribution, Dense):
            return d.noise(lo, hi)[0]
        return torch.stack(
            [torch.cat([run.clone() for _, run in d.entries(i, 0, d.space.size)]) for i in range(lo, hi)]
        )

    def _by_value(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of shape (rows, slices) at each value of the rows."""
        return weights.repeat_interleave(self.directions.space.dim, dim=1) if weights.shape[1] > 1 else weights

    def radii(self, like: torch.Tensor) -> torch.Tensor:
        """The smoothing radius at each value."""
        space = self.directions.space
        leaves = [like.new_full(shape, radius) for shape, radius in zip(space.shapes, self.sigma, strict=True)]
        return space.join(tuple(leaves))


def spread(groups: Groups, weights: torch.Tensor, mean: torch.Tensor) -> ErrorBars:
    r"""The error of a mean over independent groups, :math:`\frac{B}{B-1} \sum_b (S_b - n_b \bar X)^2 / N^2`.

    Args:
        groups: the B groups, whose sums are S_b.
        weights: the coefficients, float64 of shape (N, slices).
        mean: what they make.

    Returns:
        The error.
    """
    total, num = torch.zeros_like(mean), len(groups.directions)
    left = num if groups.alive is None else groups.count
    weights = weights * (left / num)  # without what makes the mean over all directions that over the survivors
    unit = _unit(weights, groups.sigma)
    with groups.directions.space.full_precision():
        for lo, rows in groups.sums((weights / unit).to(mean)):
            deviations = rows - groups.held(lo) * (mean / unit)
            if groups.alive is not None:
                deviations = deviations[groups.alive[lo : lo + len(rows)].to(mean.device)]
            total += deviations.square_().sum(dim=0)
    variance = total.double() * (unit**2 * groups.count / (groups.count - 1) / left**2)
    return ErrorBars(mean, variance, groups, _halves(groups, lambda kept: weights * kept.to(weights).unsqueeze(1)))


def compared(groups: Groups, only: Callable[[torch.Tensor], torch.Tensor], mean: torch.Tensor) -> ErrorBars:
    """The error where coefficients depend on each other, by a jackknife over parts of the groups.

    Args:
        groups: the groups.
        only: from a mask of directions to the coefficients of an estimate from these alone, of shape (N, slices), zero
            at the others.
        mean: the estimate.

    Returns:
        The error.
    """
    step = math.ceil(groups.count / _FOLDS) * groups.size
    part = torch.arange(len(groups.directions)) // step
    masks = [part != k for k in range(int(part[-1]) + 1)]
    means = torch.stack([_from(groups, only(kept), kept) for kept in masks if groups.among(kept)]).double()
    variance = (means - means.mean(dim=0)).square_().sum(dim=0) * ((len(means) - 1) / len(means))
    return ErrorBars(mean, variance, groups, _halves(groups, only))


def _unit(weights: torch.Tensor, sigma: tuple[float, ...]) -> float:
    """A power of two of the size of the largest term, in whose units no square leaves the range of the dtype."""
    largest = float(weights.abs().max()) / min(sigma)
    return 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def _halves(groups: Groups, only: Callable[[torch.Tensor], torch.Tensor]) -> Halves:
    odd = groups.odd()
    return lambda: (_from(groups, only(odd), odd), _from(groups, only(~odd), ~odd))


def _from(groups: Groups, weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The estimate from some of the directions, with weights that are zero at the others."""
    return contract(groups.directions, groups.sigma, weights * (len(kept) / groups.among(kept)))


@dataclass(frozen=True)
class Length:
    """The length of a vector, as estimates of it by independent parts of the directions tell it.

    Args:
        square: the squared length, unbiased: the mean product of two parts' estimates.
        square_error: its standard error, by a jackknife over parts.
        variance: of one direction's estimate, the trace.
        parts: the parts' estimates, float64 of shape (parts, size).
    """

    square: float
    square_error: float
    variance: float
    parts: torch.Tensor

    @property
    def resolved(self) -> bool:
        """Whether the vector shows above the noise."""
        return self.square > 2 * self.square_error

    def replace(self, square: float, error: float) -> Length:
        """The same with a squared length that is known from elsewhere."""
        return Length(square, error, self.variance, self.parts)

    def most(self) -> float:
        """What its squared length hardly exceeds."""
        return max(self.square, 0.0) + 2 * self.square_error

    def directions_needed(self, cosine: float = 0.9) -> float:
        """N for a mean of that cosine: E|mean|^2 = |g|^2 + V/N; infinite where the vector does not show."""
        return self.variance / self.square * _odds(cosine) if self.resolved else math.inf

    def at_least(self, cosine: float = 0.9) -> float:
        """What that hardly falls short of."""
        most = self.most()
        return self.variance / most * _odds(cosine) if most else math.inf

    def cosine(self, num: int) -> float:
        """What to expect of an estimate with so many directions."""
        square = max(self.square, 0.0)
        return math.sqrt(square / (square + self.variance / num)) if square else 0.0


def length(groups: Groups, weights: torch.Tensor) -> Length:
    """Return what estimates by parts of some directions tell about the length of their mean.

    Args:
        groups: the directions, each a group by itself.
        weights: the coefficients over the largest radius, float64 of shape (N,).

    Returns:
        The length.
    """
    total, size = len(groups.directions), groups.directions.space.size
    num = min(total, max(4, min(_MOST_PARTS, _LARGEST // size)), max(_PARTS, _SMALL // size))
    bounds = [total * k // num for k in range(num + 1)]
    if total * size <= _SMALL:
        groups.directions.noise(0, total)  # all blocks at once, which stay in memory for the next call
    means = torch.stack([_part(groups, weights, lo, hi) for lo, hi in itertools.pairwise(bounds)])
    gram = means @ means.T
    off = gram.sum() - gram.trace()
    square = float(off) / (num * (num - 1))
    without = (off - 2 * (gram.sum(dim=1) - gram.diagonal())) / ((num - 1) * (num - 2))
    error = math.sqrt(float((without - without.mean()).square().sum()) * (num - 1) / num)
    within = max(0.0, float(gram.trace() - gram.sum() / num)) / (num - 1)
    return Length(square, error, within * total / num, means)


# A variance over few parts is known badly where there are few parameters, and many parts cost time where many.
_PARTS, _MOST_PARTS = 16, 256
_SMALL = 1 << 20  # entries up to which there are more parts, and directions are drawn once
_LARGEST = 1 << 27  # entries of all parts' estimates together, at most


def _part(groups: Groups, weights: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
    """The estimate by directions ``lo`` to ``hi`` alone, flat, in float64; each block is drawn once."""
    d, total, at = groups.directions, None, lo
    space, family = d.space, d.distribution
    c = weights.to(space.device, space.dtype)[:, None]
    with space.full_precision():
        while at < hi:
            end = min(hi, (at // d.block + 1) * d.block)
            total = family.add_sum(space, d.noise(at, end), c[at:end], total)
            at = end
    assert total is not None
    factor = family.scale(space) / (hi - lo) * max(groups.sigma)
    leaves = zip(space.split(total.double()), groups.sigma, strict=True)
    return torch.cat([(leaf * (factor / radius)).reshape(-1) for leaf, radius in leaves]).cpu()


def _odds(cosine: float) -> float:
    return cosine**2 / (1 - cosine**2)
