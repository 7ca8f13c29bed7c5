"""Sums over directions and products with them: the only places where directions meet numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zograd._base.execution import full_precision

if TYPE_CHECKING:
    from zograd._base.trees import Space
    from zograd.distributions.directions import Directions


class WeightedMean:
    """The weighted mean of directions, ``mean_i c_i eps_i / sigma``, by fixed blocks in order.

    The sum runs over the same blocks whatever the evaluator's chunks are, so its bits are a function of the
    coefficients. It goes on while values arrive, so that each direction is drawn once.

    Args:
        directions: the directions.
        sigma: the smoothing radius of each leaf.
    """

    def __init__(self, directions: Directions, sigma: tuple[float, ...]) -> None:
        self._directions = directions
        self._sigma = sigma
        self._done = 0  # directions summed
        self._waiting: torch.Tensor | None = None  # coefficients of a block that is not whole yet
        self._sum: torch.Tensor | None = None

    def add(self, coefficients: torch.Tensor) -> None:
        """Take the coefficients of the next directions, one for each slice, and sum every block that is whole now."""
        d, space = self._directions, self._directions.space
        c = coefficients.reshape(-1, space.slices).to(device=space.device, dtype=space.dtype)
        if self._waiting is not None:
            c = torch.cat([self._waiting, c])
        used, known = 0, c.shape[0]  # not len(): torch's is a Python function
        with full_precision(space.device):
            while (rows := min(d.block, d.num - self._done)) and used + rows <= known:
                self._sum = d.add_sum(self._done, c if rows == known else c[used : used + rows], self._sum)
                self._done += rows
                used += rows
        self._waiting = c[used:] if used < known else None

    def result(self, num: int | None = None) -> torch.Tensor:
        """Return the flat mean over the first ``num`` directions, of shape (size,) in the compute dtype."""
        d, space = self._directions, self._directions.space
        if self._waiting is not None:  # the estimate ended within a block
            rows = min(d.block, d.num - self._done) - self._waiting.shape[0]
            self.add(self._waiting.new_zeros(rows, space.slices))
        assert self._sum is not None
        divisor = (len(d) if num is None else num) / d.distribution.scale(space)
        if len(set(self._sigma)) == 1:
            return self._sum.div_(divisor * self._sigma[0])
        for leaf, sigma in zip(space.split(self._sum), self._sigma, strict=True):
            leaf.div_(divisor * sigma)
        return self._sum


def contract(directions: Directions, sigma: tuple[float, ...], coefficients: torch.Tensor) -> torch.Tensor:
    """Return the flat gradient that belongs to coefficients of shape (N, slices)."""
    mean = WeightedMean(directions, sigma)
    mean.add(coefficients)
    return mean.result()


def project(directions: Directions, sigma: tuple[float, ...], vector: torch.Tensor) -> torch.Tensor:
    """Return the transpose of :func:`contract`: ``eps_i . vector / (N sigma)``, float64 of shape (N, slices)."""
    space, family = directions.space, directions.distribution
    leaves = zip(space.split(vector), sigma, strict=True)
    scaled = space.join(tuple(leaf / radius for leaf, radius in leaves))
    with full_precision(space.device):
        dots = [family.dot(space, directions.noise(lo, hi), scaled) for lo, hi in directions.blocks()]
    return torch.cat(dots)[: len(directions)].double() * (family.scale(space) / len(directions))


def by_slice(values: torch.Tensor, space: Space, lead: int) -> torch.Tensor:
    """Return values of shape (*lead, *out) as (*lead, slices, outputs a slice)."""
    if space.batch_dim is not None:
        values = values.movedim(lead + space.batch_dim, lead)
    return values.reshape(*values.shape[:lead], space.slices, -1)


def one_per_slice(values: torch.Tensor, space: Space) -> torch.Tensor:
    """Return values (N, *out) of an objective of one value a slice as (N, slices)."""
    return by_slice(values, space, 1).squeeze(2)


def from_slices(values: torch.Tensor, shape: torch.Size, space: Space, lead: int) -> torch.Tensor:
    """Return values of shape (*lead, slices, outputs a slice) as (*lead, *out), ``shape`` being ``out``."""
    if space.batch_dim is None:
        return values.reshape(*values.shape[:lead], *shape)
    rest = shape[: space.batch_dim] + shape[space.batch_dim + 1 :]
    return values.reshape(*values.shape[:lead], space.slices, *rest).movedim(lead, lead + space.batch_dim)


def weigh(coefficients: torch.Tensor, cotangent: torch.Tensor, space: Space) -> torch.Tensor:
    """Return coefficients (N, *out) times a cotangent (*out), one number a direction and slice, (N, slices)."""
    columns = by_slice(coefficients, space, 1)
    return (columns * by_slice(cotangent.to(columns), space, 0)).sum(dim=2)
