"""Pairs of particles: where they are evaluated, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.streams import derive
from zograd.distributions.directions import Directions
from zograd.errors import NonFiniteError
from zograd.estimate.estimate import pieces
from zograd.evaluators.task.points import Points

if TYPE_CHECKING:
    from zograd._base.trees import Leaves
    from zograd.evaluators.base import Evaluator
    from zograd.evaluators.task.objective import Objective

SIDES = (1.0, -1.0)


def draw(directions: Directions) -> torch.Tensor:
    """All directions, and their negatives, over the flat parameters: (N, 2, d).

    Directions that depend on each other are shuffled. Those of one index in two windows would go together otherwise
    (they are one point of Sobol's sequence, scrambled twice), and no number of particles would average that out.

    Returns:
        The directions, in the compute dtype.
    """
    family, space = directions.distribution, directions.space
    zeros = tuple([torch.zeros(shape, dtype=space.dtype, device=space.device) for shape in space.shapes])
    rows = []
    for lo, hi in directions.blocks():
        parts = family.parts(space, directions.noise(lo, hi))
        leaves = family.shift(space, zeros, parts, (1.0,) * len(zeros))
        rows.append(torch.cat([leaf.reshape(hi - lo, -1) for leaf in leaves], dim=1))
    eps = torch.cat(rows)
    if not family.independent:
        order = torch.Generator().manual_seed(derive(directions.seed, 2))
        eps = eps[torch.randperm(len(eps), generator=order).to(eps.device)]
    return torch.stack([eps, -eps], dim=1)


class Particles(Points):
    """Points that differ in more than the parameters: each has its own state, and a perturbation that may be old.

    Args:
        params: the differentiated leaves, detached.
        center: the packed state of the center.
        directions: their number and layout; nothing is drawn from them here.
        sigma: the smoothing radius of each leaf.
        shifts: the perturbations, (N, 2, d).
        states: the packed states, (N, 2, size).
    """

    def __init__(
        self,
        params: Leaves,
        center: torch.Tensor,
        directions: Directions,
        sigma: tuple[float, ...],
        shifts: torch.Tensor,
        states: torch.Tensor,
    ) -> None:
        # All that the values depend on is among the parameters, for the digest of a journal.
        super().__init__((*params, center, shifts, states), directions, sigma, SIDES)
        self._leaves, self._shifts, self._states, self._start = params, shifts, states, center

    def center(self) -> Leaves:
        """Return copies of the parameters and the center's state."""
        return (*(p.clone() for p in self._leaves), self._start.clone())

    def point(self, i: Any, offset: float) -> Leaves:
        """Return the point of pair ``i``, or of many with a leading axis, at an offset."""
        j, space = SIDES.index(offset), self.directions.space
        eps = space.split(self._shifts[i, j])
        triples = zip(self._leaves, eps, self.sigma, strict=True)
        moved = tuple([torch.add(p.to(e.dtype), e, alpha=s).to(p.dtype) for p, e, s in triples])
        return (*moved, self._states[i, j].clone())


@dataclass(frozen=True)
class Values:
    """What a window gave.

    Attributes:
        loss: of the center, float64.
        center: its packed state.
        losses: of the particles, (N, 2).
        states: their packed states, (N, 2, size).
    """

    loss: torch.Tensor
    center: torch.Tensor
    losses: torch.Tensor
    states: torch.Tensor


def evaluate(
    objective: Objective, evaluator: Evaluator, points: Particles, seed: int, pairs: int | None = None
) -> Values:
    """Have an evaluator call the window at the center and at pairs of particles.

    Args:
        objective: the window.
        evaluator: what calls it.
        points: the particles.
        seed: of the random state that the window sees.
        pairs: how many; None for all.

    Returns:
        The values.

    Raises:
        NonFiniteError: if a loss is nan or infinite.
        ValueError: if the evaluator gave another number of values.
    """
    num = len(points.directions) if pairs is None else pairs
    with objective.estimating(seed, shared=False):
        center, _ = objective.take_center(evaluator.center(objective, points), points)
        rows = list(pieces(evaluator, objective, points, 0, num))
    values = torch.cat([*rows, center.new_empty(0, len(SIDES), len(center))])
    result = Values(center[0], center[1:], values[..., 0], values[..., 1:])
    _check(result, objective.name)
    return result


def _check(values: Values, name: str) -> None:
    if not torch.isfinite(values.loss):
        raise NonFiniteError(f"{name} returned a loss that is not finite at the parameters: {values.loss.item()}.")
    finite = torch.isfinite(values.losses)
    if not finite.all():
        bad = (~finite).nonzero().tolist()
        where = ", ".join(f"{i} ({'+-'[j]})" for i, j in bad[:8])
        raise NonFiniteError(
            f"{name} returned a loss that is not finite at {len(bad)} of {values.losses.numel()} particles: at pair "
            f"{where}{', ...' if len(bad) > 8 else ''}. A gradient from them would be wrong; return a finite penalty."
        )
