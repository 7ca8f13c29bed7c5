"""Sums over directions and products with them: the only places where directions meet numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from zograd._base.execution import full_precision

if TYPE_CHECKING:
    from zograd._base.trees import Space
    from zograd.distributions.directions import Directions

Coefficients: TypeAlias = "torch.Tensor | list[float]"

_FITS = torch.finfo(torch.float32).max  # into every dtype that sums are made in


class Contraction:
    """The weighted mean of directions, ``mean_i c_i eps_i / sigma``, by fixed blocks in order.

    The sum runs over the same blocks whatever the evaluator's chunks are, so its bits are a function of the
    coefficients.

    Args:
        directions: the directions.
        sigma: the smoothing radius of each leaf.
    """

    def __init__(self, directions: Directions, sigma: tuple[float, ...]) -> None:
        self._directions = directions
        self._sigma = sigma
        self._space = directions.space
        self._done = 0  # directions summed
        self._waiting: torch.Tensor | None = None  # coefficients of a block that is not whole yet
        self._sum: torch.Tensor | None = None

    def add(self, coefficients: Coefficients) -> None:
        """Take the coefficients of the next directions, one for each slice, and sum every block that is whole now."""
        d, space = self._directions, self._space
        if isinstance(coefficients, list) and len(coefficients) == 1 and abs(coefficients[0]) < _FITS:
            # Without a list to be looked through; it raises where a tensor of too large a number is infinite.
            c = torch.full((1, 1), coefficients[0], dtype=space.dtype, device=space.device)
        elif isinstance(coefficients, list):
            c = torch.tensor(coefficients, dtype=space.dtype, device=space.device).view(-1, 1)
        else:
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

    def result(self) -> torch.Tensor:
        """The flat gradient, of shape (size,) in the compute dtype."""
        if self._waiting is not None:  # the estimate ended within a block
            rows = min(self._directions.block, self._directions.num - self._done) - self._waiting.shape[0]
            self.add(self._waiting.new_zeros(rows, self._space.slices))
        assert self._sum is not None
        divisor = len(self._directions) / self._directions.distribution.scale(self._space)
        if len(set(self._sigma)) == 1:
            return self._sum.div_(divisor * self._sigma[0])
        for leaf, sigma in zip(self._space.split(self._sum), self._sigma, strict=True):
            leaf.div_(divisor * sigma)
        return self._sum


def contract(directions: Directions, sigma: tuple[float, ...], coefficients: torch.Tensor) -> torch.Tensor:
    """The flat gradient that belongs to coefficients of shape (N, slices)."""
    contraction = Contraction(directions, sigma)
    contraction.add(coefficients)
    return contraction.result()


def by_slice(values: torch.Tensor, space: Space, lead: int) -> torch.Tensor:
    """Values of shape (*lead, *out) as (*lead, slices, outputs a slice)."""
    if space.batch_dim is not None:
        values = values.movedim(lead + space.batch_dim, lead)
    return values.reshape(*values.shape[:lead], space.slices, -1)


def weigh(coefficients: torch.Tensor, cotangent: torch.Tensor, space: Space) -> torch.Tensor:
    """Coefficients (N, *out) and a cotangent (*out) to one number a direction and slice, (N, slices)."""
    columns = by_slice(coefficients, space, 1)
    return (columns * by_slice(cotangent.to(columns), space, 0)).sum(dim=2)


def from_slices(values: torch.Tensor, shape: torch.Size, space: Space, lead: int) -> torch.Tensor:
    """Values of shape (*lead, slices, outputs a slice) as (*lead, *out), ``shape`` being ``out``."""
    if space.batch_dim is None:
        return values.reshape(*values.shape[:lead], *shape)
    rest = shape[: space.batch_dim] + shape[space.batch_dim + 1 :]
    return values.reshape(*values.shape[:lead], space.slices, *rest).movedim(lead, lead + space.batch_dim)


def project(directions: Directions, sigma: tuple[float, ...], vector: torch.Tensor) -> torch.Tensor:
    """The transpose of :func:`contract`: ``eps_i . vector / (N sigma)``, float64 of shape (N, slices)."""
    space, family = directions.space, directions.distribution
    leaves = zip(space.split(vector), sigma, strict=True)
    scaled = space.join(tuple(leaf / radius for leaf, radius in leaves))
    with full_precision(space.device):
        dots = [family.dot(space, directions.noise(lo, hi), scaled) for lo, hi in directions.blocks()]
    return torch.cat(dots)[: len(directions)].double() * (family.scale(space) / len(directions))
