"""Moments of directions, from means over groups that are independent of each other."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zograd.distributions.base import Distribution
from zograd.distributions.directions import Directions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd._base.trees import Space
    from zograd.distributions.base import Noise

_MEANS = 256  # independent means that every test rests on
_ROWS = 32  # directions in one of them, of an independent family
_FRAME = 64  # likewise of one with groups
_VALUES = 1 << 24  # about as many are looked at
_PAIRS = 64  # seeds of a family with groups
_SEEDS = 2  # of an independent one
_SAMPLES = 1 << 12  # directions of each
_LARGEST = 1 << 20  # values of a group
_VECTORS = 6


@dataclass(frozen=True)
class Samplings:
    """How directions are drawn to be looked at: so many groups, which do not know of each other."""

    family: Distribution
    space: Space
    seed: int
    rows: int  # directions of one mean
    means: int

    @classmethod
    def of(cls, family: Distribution, space: Space, seed: int) -> Samplings:
        """What fits the family and the size of its directions."""
        most = max(1, _VALUES // (space.size * _MEANS))
        if family.independent:
            return cls(family, space, seed, min(_ROWS, most), _MEANS)
        group = family.group(space, 1 << 16)
        return cls(family, space, seed, min(group, _FRAME, most), _MEANS)

    def batches(self) -> Iterator[torch.Tensor]:
        """Groups of directions, of shape (groups, rows, size)."""
        if not self.family.independent:
            for k in range(self.means):
                yield self._whole(Directions(self.family, self.space, self.seed + k, self.rows), 0, self.rows)[None]
            return
        directions = Directions(self.family, self.space, self.seed, self.rows * self.means)
        step = max(1, directions.block // self.rows) * self.rows
        for lo in range(0, len(directions), step):
            hi = min(lo + step, len(directions))
            yield self._whole(directions, lo, hi).view(-1, self.rows, self.space.size)

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Neighboring groups of one seed, and first groups of neighboring seeds; none if they are too large."""
        block = max(self.family.group(self.space, 1 << 16), self.family.rows(self.space, 1 << 16))
        if block * self.space.size > _LARGEST:
            return []
        independent = self.family.independent  # each direction then is a sample of its own
        num = min(block, _SAMPLES if independent else self.rows)
        found = []
        seeds = _PAIRS if block * self.space.size <= _LARGEST >> 3 else _PAIRS >> 2
        for k in range(_SEEDS if independent else seeds):
            directions = Directions(self.family, self.space, self.seed + k, block + num)
            found.append((self._whole(directions, 0, num), self._whole(directions, block, block + num)))
        firsts = [first for first, _ in found]
        return found + list(itertools.pairwise(firsts))

    def _whole(self, directions: Directions, lo: int, hi: int) -> torch.Tensor:
        return dense(self.family, self.space, directions.noise(lo, hi))


def dense(family: Distribution, space: Space, noise: Noise) -> torch.Tensor:
    """Directions as the points show them: a copy, of shape (rows, size)."""
    zeros = tuple(torch.zeros(shape, dtype=space.dtype) for shape in space.shapes)
    leaves = family.shift(space, zeros, family.parts(space, noise), (1.0,) * len(zeros))
    return torch.cat([leaf.reshape(noise[0].shape[0], -1) for leaf in leaves], dim=1)


def student(z: float, freedom: int) -> float:
    """Student's quantile where the normal law has z, since deviations are those of the samples (Cornish-Fisher)."""
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


class _Sums:
    """The first three power sums of independent vectors."""

    def __init__(self, size: int) -> None:
        self.num = 0
        self._sums = torch.zeros(3, size, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        self.num += len(rows)
        for power in (1, 2, 3):
            self._sums[power - 1] += (rows**power).sum(dim=0)

    def worst(self, expected: torch.Tensor, z: float) -> tuple[float, float]:
        """The largest deviation of a mean in units of its limit, and as it is.

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


_EXACT = 1e-5  # what rounding may add to a moment that is exact


class Moments:
    """What a family's moments are, value by value and along some random vectors."""

    def __init__(self, family: Distribution, space: Space, seed: int) -> None:
        self.family = family
        self.space = space
        generator = torch.Generator().manual_seed((seed + 2) % (1 << 32))
        vectors = torch.randn(_VECTORS, space.size, generator=generator, dtype=torch.float64)
        vectors[0] = 1.0  # what all values have in common
        self._vectors = vectors / vectors.norm(dim=1, keepdim=True)
        self._pairs = torch.triu_indices(_VECTORS, _VECTORS)
        self._values, self._squares, self._fourths = _Sums(space.size), _Sums(space.size), _Sums(1)
        self._along, self._products = _Sums(_VECTORS), _Sums(self._pairs.shape[1])

    @property
    def tests(self) -> int:
        """How many comparisons a report makes, and a tenth more for those of independence."""
        return math.ceil(1.1 * (2 * self.space.size + _VECTORS + self._pairs.shape[1] + 1))

    def add(self, groups: torch.Tensor) -> None:
        """Take some groups, (groups, rows, size)."""
        x = groups.double()
        s = self.family.scale(self.space)
        self._values.add(x.mean(dim=1))
        self._squares.add(s * x.square().mean(dim=1))
        self._fourths.add(x.pow(4).mean(dim=(1, 2))[:, None])
        along = x @ self._vectors.T
        self._along.add(along.mean(dim=1))
        i, j = self._pairs
        self._products.add(s * (along[..., i] * along[..., j]).mean(dim=1))

    def worst_mean(self, z: float) -> tuple[float, float]:
        """The largest deviation of a mean from zero, in units of its limit, and as it is."""
        found = [sums.worst(torch.zeros(1, dtype=torch.float64), z) for sums in (self._values, self._along)]
        return max(found)[0], found[0][1]

    def worst_covariance(self, z: float) -> tuple[float, float]:
        """Likewise of a second moment from the statement."""
        stated = torch.stack([self._stated(v) for v in self._vectors])
        i, j = self._pairs
        found = [self._products.worst((stated @ self._vectors.T)[i, j], z)]
        diagonal = self._diagonal()
        if diagonal is not None:
            found.append(self._squares.worst(diagonal, z))
        return max(found)

    def worst_fourth(self, z: float) -> float:
        """Likewise of the mean fourth moment from that of the standard normal law."""
        return self._fourths.worst(torch.full((1,), 3.0, dtype=torch.float64), z)[0]

    def kurtosis(self) -> float:
        """The mean fourth moment over the square of the mean second one."""
        second = float(self._squares._sums[0].mean()) / self._squares.num / self.family.scale(self.space)
        return float(self._fourths._sums[0]) / self._fourths.num / max(second**2, 1e-300)

    def _stated(self, vector: torch.Tensor) -> torch.Tensor:
        return self.family.covariance(self.space, vector.to(self.space.dtype)).double()

    def _diagonal(self) -> torch.Tensor | None:
        if type(self.family).covariance is Distribution.covariance:
            return torch.ones(self.space.size, dtype=torch.float64)
        if self.space.size > _DIAGONAL:
            return None  # the products along vectors must do
        return torch.stack([self._stated(row)[k] for k, row in enumerate(torch.eye(self.space.size))])


_DIAGONAL = 2048
