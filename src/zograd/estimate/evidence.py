"""The values of an estimate, and what can be told from them: coefficients, survivors, second differences."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from zograd.errors import NonFiniteError, SecondDerivativeError
from zograd.estimate.checks import all_finite
from zograd.estimate.second_order import differences, refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd.distributions.directions import Directions
    from zograd.distributions.sums import Coefficients
    from zograd.estimate.settings import Recipe
    from zograd.estimate.surrogate import ControlVariate
    from zograd.evaluators.base import Piece


class Evidence:
    """The values of an estimate, from which more can be told later than its gradient.

    Args:
        recipe: what the estimate is made of.
        pieces: the values, as the evaluator gave them.
        center: the value at the center.
    """

    def __init__(self, recipe: Recipe, pieces: list[Piece], center: torch.Tensor) -> None:
        self.recipe = recipe
        self._pieces = pieces
        self._center = center
        self.control: ControlVariate | None = None  # the part of a surrogate

    def differences(self, directions: Directions) -> torch.Tensor:
        """The second difference along each direction, float64 of shape (N, *out), the mean of the others removed."""
        values, alive = joined(self._pieces), self.alive
        if alive is None:
            rows = differences(self.recipe.scheme, directions, values, self._center)
            return rows.to(directions.space.device)  # of a black box on the CPU they are there
        if not directions.distribution.independent:
            raise SecondDerivativeError(
                refused(f"directions were dropped, and those of {directions.distribution} depend on each other")
            )
        rows = _spread(differences(self.recipe.scheme, directions, values[alive], self._center), alive)
        return rows.to(directions.space.device)

    @cached_property
    def alive(self) -> torch.Tensor | None:
        """Which directions were not dropped; None for all."""
        alive = finite_rows(joined(self._pieces)).cpu()
        return None if bool(alive.all()) else alive

    def reshaped(self, kept: torch.Tensor) -> torch.Tensor:
        """The coefficients that a shaping makes of the values of some directions alone, zero at the others."""
        kept = kept if self.alive is None else kept & self.alive
        num, sides = int(kept.sum()), len(self.recipe.scheme.sides)
        if num * sides < 2:
            raise ValueError(
                f"`estimate.standard_error()` shapes parts of the values on their own, and a part of {num} has nothing "
                "to be compared with: `num_samples` must be at least 4 here."
            )
        rows = torch.zeros(len(kept), 1, dtype=torch.float64)
        rows[kept, 0] = _shaped(joined(self._pieces)[kept], self._center, self.recipe).cpu()
        return rows


def tensor_of(piece: Coefficients | Piece) -> torch.Tensor:
    """A piece in one form, whichever an evaluator gave it in."""
    return torch.tensor(piece, dtype=torch.float64) if isinstance(piece, list) else piece


def joined(pieces: Sequence[Coefficients | Piece]) -> torch.Tensor:
    """All pieces as one tensor; a single one is not copied."""
    tensors = [tensor_of(piece) for piece in pieces]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Which directions have finite values only."""
    return torch.isfinite(values).flatten(1).all(dim=1)


def surviving(values: torch.Tensor, center: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The coefficients of directions whose values are finite, the others' being zero."""
    alive = finite_rows(values)
    whole = bool(alive.all())
    rows = values if whole else values[alive]
    rows = _shaped(rows, center, recipe) if recipe.shaping else recipe.scheme.combine(rows, center)
    return rows if whole else _spread(rows, alive)


def _spread(rows: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Rows of the survivors among all, such that the mean over all is that over the survivors."""
    out = rows.new_zeros((len(alive), *rows.shape[1:]))
    out[alive] = rows * (len(alive) / len(rows))
    return out


def _shaped(values: torch.Tensor, center: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    assert recipe.shaping is not None
    baseline = center if recipe.scheme.uses_center else torch.zeros_like(center)
    shaped = recipe.shaping(values - baseline)
    if not isinstance(shaped, torch.Tensor) or shaped.shape != values.shape:
        got = tuple(shaped.shape) if isinstance(shaped, torch.Tensor) else type(shaped).__name__
        raise ValueError(
            f"`zero_order(shaping=...)` must keep the shape of the values, {tuple(values.shape)}, got {got}."
        )
    if not all_finite(shaped):
        raise NonFiniteError(f"`zero_order(shaping=...)` made non-finite values of finite ones: {recipe.shaping}.")
    return recipe.scheme.combine(shaped.to(values), torch.zeros_like(center))
