"""Moments of directions, from means over groups that are independent of each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zograd.diagnostics.distribution.limits import student
from zograd.diagnostics.distribution.report import Finding
from zograd.distributions.base import Distribution

if TYPE_CHECKING:
    from zograd._base.trees import Space

_VECTORS = 6
_EXACT = 1e-5  # what rounding may add to a moment that is exact
_DIAGONAL = 2048  # entries up to which a stated covariance is asked for each


class _Sums:
    """The first three power sums of independent vectors."""

    def __init__(self, size: int) -> None:
        self.num = 0
        self._sums = torch.zeros(3, size, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        self.num += len(rows)
        for power in (1, 2, 3):
            self._sums[power - 1] += (rows**power).sum(dim=0)

    def mean(self) -> torch.Tensor:
        return self._sums[0] / self.num

    def worst(self, expected: torch.Tensor, z: float) -> tuple[float, float]:
        """Return the largest deviation of a mean in units of its limit, and as it is.

        Far in the tail the normal law is off where samples are skewed: the Cornish-Fisher term says by how much. A
        deviation that is small by chance (a coordinate that was never visited) is replaced by the typical one.

        Returns:
            Both.
        """
        first, second, third = self._sums / self.num
        variance = (second - first**2).clamp_min(0.0)
        central = third - 3 * first * second + 2 * first**3
        deviation = torch.maximum(variance, variance.mean()).sqrt()
        skewness = torch.maximum(central.abs(), central.abs().mean()) / deviation.clamp_min(1e-300) ** 3
        skewness = torch.where(deviation > _EXACT, skewness, torch.zeros_like(skewness))
        limit = student(z, self.num - 1) + skewness * (z**2 - 1) / (6 * math.sqrt(self.num))
        allowed = limit * deviation / math.sqrt(self.num) + _EXACT
        off = (first - expected).abs().nan_to_num(nan=math.inf)
        k = int((off / allowed).argmax())
        return float(off[k] / allowed[k]), float(off.max())


class Moments:
    """The moments of a family, entry by entry and along some random vectors."""

    def __init__(self, family: Distribution, space: Space, seed: int) -> None:
        self.family = family
        self.space = space
        generator = torch.Generator().manual_seed((seed + 2) % (1 << 32))
        vectors = torch.randn(_VECTORS, space.size, generator=generator, dtype=torch.float64)
        vectors[0] = 1.0  # what all values have in common
        self.directions: int = 0  # looked at so far
        self._vectors = vectors / vectors.norm(dim=1, keepdim=True)
        self._pairs = torch.triu_indices(_VECTORS, _VECTORS)
        self._values, self._squares, self._fourths = _Sums(space.size), _Sums(space.size), _Sums(1)
        self._along, self._products = _Sums(_VECTORS), _Sums(self._pairs.shape[1])

    @property
    def tests(self) -> int:
        """The comparisons that a report makes, and a tenth more for those of independence."""
        return math.ceil(1.1 * (2 * self.space.size + _VECTORS + self._pairs.shape[1] + 1))

    def add(self, groups: torch.Tensor) -> None:
        """Take some groups, (groups, rows, size)."""
        x = groups.double()
        self.directions += groups.shape[0] * groups.shape[1]
        s = self.family.scale(self.space)
        self._values.add(x.mean(dim=1))
        self._squares.add(s * x.square().mean(dim=1))
        self._fourths.add(x.pow(4).mean(dim=(1, 2))[:, None])
        along = x @ self._vectors.T
        self._along.add(along.mean(dim=1))
        i, j = self._pairs
        self._products.add(s * (along[..., i] * along[..., j]).mean(dim=1))

    def mean(self, z: float) -> Finding:
        """Compare the mean of every entry, and along the vectors, with zero."""
        if not self.family.centered:
            return Finding("mean", None, "not zero, as it says; only differences make a gradient")
        found = [sums.worst(torch.zeros(1, dtype=torch.float64), z) for sums in (self._values, self._along)]
        worst = max(found)[0]
        return Finding("mean", worst <= 1, f"0 within {found[0][1]:.2g} for every value", worst)

    def covariance(self, z: float) -> Finding:
        """Compare second moments with the family's statement."""
        stated = torch.stack([self._stated(v) for v in self._vectors])
        i, j = self._pairs
        found = [self._products.worst((stated @ self._vectors.T)[i, j], z)]
        diagonal = self._diagonal()
        if diagonal is not None:
            found.append(self._squares.worst(diagonal, z))
        worst, off = max(found)
        detail = "as stated" if worst <= 1 else "not as stated"
        return Finding("covariance", worst <= 1, f"{detail}; largest deviation {off:.2g}", worst)

    def fourth(self, z: float) -> Finding:
        """Compare the mean fourth moment with that of the standard normal law, if the family says it is that."""
        kurtosis = f"kurtosis {self.kurtosis():.3f}"
        if not self.family.gaussian_marginals:
            return Finding("fourth moment", None, f"{kurtosis}; it does not say that its marginals are Gaussian")
        worst, _ = self._fourths.worst(torch.full((1,), 3.0, dtype=torch.float64), z)
        return Finding("fourth moment", worst <= 1, f"{kurtosis}, 3 for Gaussian marginals", worst)

    def kurtosis(self) -> float:
        """Return the mean fourth moment over the square of the mean second one."""
        second = float(self._squares.mean().mean()) / self.family.scale(self.space)
        return float(self._fourths.mean()) / max(second**2, 1e-300)

    def _stated(self, vector: torch.Tensor) -> torch.Tensor:
        return self.family.covariance(self.space, vector.to(self.space.dtype)).double()

    def _diagonal(self) -> torch.Tensor | None:
        if type(self.family).covariance is Distribution.covariance:
            return torch.ones(self.space.size, dtype=torch.float64)
        if self.space.size > _DIAGONAL:
            return None  # the products along vectors must do
        return torch.stack([self._stated(row)[k] for k, row in enumerate(torch.eye(self.space.size))])
