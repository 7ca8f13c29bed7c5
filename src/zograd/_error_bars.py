r"""How far an estimate may be from its mean, told from the values that it was made of.

An estimate is a mean over groups of directions that do not depend on each other: single directions, or whole blocks of
a family whose directions complement each other. How far the groups' own estimates lie from their mean tells the error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zograd._contraction import contract, full_precision
from zograd.distributions.base import Dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zograd._points import Directions

__all__ = ["ErrorBars"]

_ROOM = 1 << 20  # values of rows that are squared together
_FOLDS = 32  # parts of a jackknife: each costs a sum over all directions


class ErrorBars:
    r"""The error of a mean over directions.

    Args:
        directions: the directions.
        sigma: the smoothing radius of each leaf.
        weights: the coefficients, float64 of shape (N, slices).
        mean: what they make, of shape (size,).
        typed: what the user called, for errors.
        only: for coefficients that depend on each other, those of an estimate from the directions of a mask alone, of
            shape (N, slices), zero at the others.
    """

    def __init__(
        self,
        directions: Directions,
        sigma: tuple[float, ...],
        weights: torch.Tensor,
        mean: torch.Tensor,
        typed: str,
        only: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._directions = directions
        self._sigma = sigma
        self._weights = weights
        self.mean = mean
        self.group = directions.distribution.group(directions.space, directions.num)
        self._count = -(-len(directions) // self.group)
        self._only = only
        if self._count < 2:
            raise ValueError(
                f"{typed} compares independent parts of the estimate with each other: `num_samples` must be more than "
                f"the {self.group} direction{'s' * (self.group > 1)} that make one part of "
                f"{directions.distribution}, got {len(directions)}."
            )
        self.variance = self._jackknife() if only else self._spread()
        self.noise = float(self.variance.sum(dtype=torch.float64))
        self.signal = max(0.0, float(mean.double().square().sum()) - self.noise)

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
        groups = self._count * self.noise / self.signal * cosine**2 / (1 - cosine**2)
        return max(1, math.ceil(groups - 1e-9)) * self.group

    def split_half_cosine(self) -> float:
        """The cosine between the estimates of every other group and of the rest."""
        odd = torch.arange(len(self._directions)) // self.group % 2 == 1
        first, second = self._from(odd).double(), self._from(~odd).double()
        lengths = float(first.norm() * second.norm())
        return float(first @ second) / lengths if lengths else 0.0

    def _from(self, kept: torch.Tensor) -> torch.Tensor:
        """The estimate from the directions of a mask alone."""
        weights = self._only(kept) if self._only else self._weights * kept.to(self._weights).unsqueeze(1)
        return contract(self._directions, self._sigma, weights * (len(kept) / int(kept.sum())))

    def _spread(self) -> torch.Tensor:
        r"""The mean's variance, :math:`\frac{B}{B-1} \sum_b (S_b - n_b \bar X)^2 / N^2` over the sums of B groups."""
        total = torch.zeros_like(self.mean)
        with full_precision(self.mean.device):
            for rows, counts in self._sums():
                total += (rows - counts * self.mean).square_().sum(dim=0)
        return total * (self._count / (self._count - 1) / len(self._directions) ** 2)

    def _sums(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows ``S_b``, the sums over some groups, and how many directions each has."""
        d = self._directions
        factor = d.distribution.scale(d.space) / self._radii()
        c = self._weights.to(self.mean)
        if self.group == 1:
            step = max(1, _ROOM // d.space.size)
            for start, stop in d.blocks():
                for lo in range(start, stop, step):
                    hi = min(lo + step, stop)
                    yield self._rows(lo, hi) * self._spread_out(c[lo:hi]) * factor, c.new_ones(1)
            return
        for lo in range(0, len(d), self.group):
            hi, summed = min(lo + self.group, len(d)), None
            for start in range(lo, hi, d.block):
                summed = d.add_sum(start, c[start : min(start + d.block, hi)], summed)
            assert summed is not None
            yield (summed * factor).unsqueeze(0), c.new_full((1,), float(hi - lo))

    def _rows(self, lo: int, hi: int) -> torch.Tensor:
        """Directions as rows of a matrix."""
        d = self._directions
        if isinstance(d.distribution, Dense):
            return d.noise(lo, hi)[0]
        return torch.stack([torch.cat([run.clone() for _, run in d.values(i, 0, d.space.size)]) for i in range(lo, hi)])

    def _spread_out(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of shape (rows, slices) at each value of the rows."""
        return weights.repeat_interleave(self._directions.space.dim, dim=1) if weights.shape[1] > 1 else weights

    def _radii(self) -> torch.Tensor:
        """The smoothing radius at each value."""
        space = self._directions.space
        leaves = [self.mean.new_full(shape, s) for shape, s in zip(space.shapes, self._sigma, strict=True)]
        return space.join(tuple(leaves))

    def _jackknife(self) -> torch.Tensor:
        """The variance of the mean from the estimates that leave a part of the groups out, one part after the other."""
        step = math.ceil(self._count / _FOLDS) * self.group
        part = torch.arange(len(self._directions)) // step
        means = torch.stack([self._from(part != k) for k in range(int(part[-1]) + 1)])
        return (means - means.mean(dim=0)).square_().sum(dim=0) * ((len(means) - 1) / len(means))
