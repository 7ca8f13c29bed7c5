"""One window of all particles: where they are evaluated, and the gradient of what comes back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zograd._autograd import Plan
from zograd._contraction import full_precision
from zograd._objective import Objective
from zograd._points import Directions, Points
from zograd._random import FnStream, derive
from zograd.errors import NonFiniteError
from zograd.estimator import Estimate, Evidence, Recipe, check_gradient, warn_below_resolution
from zograd.tracking import Tally

if TYPE_CHECKING:
    from zograd._tree import Leaves

__all__ = ["SIDES", "Particles", "Rule", "Values", "WindowPlan", "WindowRecipe", "draw", "evaluate"]

SIDES = (1.0, -1.0)

Rule = Callable[[torch.Tensor | None, Callable[[], torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""From the last weights, and what draws directions, to each particle's perturbation and weights, both (N, 2, d)."""


def draw(directions: Directions) -> torch.Tensor:
    """All directions, and their negatives, as they are over the flat parameters: (N, 2, d).

    Directions that depend on each other are shuffled. Those of one index in two windows would go together otherwise
    (they are one point of Sobol's sequence, scrambled twice), and no number of particles would average that out.
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

    def only(self, sides: tuple[float, ...]) -> Particles:
        """The points of these sides."""
        twin = copy.copy(self)
        twin.sides = sides
        return twin

    def center(self) -> Leaves:
        """The parameters and the center's state, as copies that the function may write to."""
        return (*(p.clone() for p in self._leaves), self._start.clone())

    def rows(self, lo: int, hi: int) -> Iterator[Callable[[float], Leaves]]:
        """For each pair, a function from a side's offset to its point."""
        return (functools.partial(self._row, i) for i in range(lo, hi))

    def batch(self, lo: int, hi: int, sides: tuple[float, ...]) -> Leaves:
        """The points of pairs ``lo`` to ``hi`` side after side, with a leading axis of rows."""
        columns = [self._at(slice(lo, hi), side) for side in sides]
        return tuple(map(torch.cat, zip(*columns, strict=True)))

    def factors(self, lo: int, hi: int, sides: tuple[float, ...]) -> tuple[Leaves, Callable[[Leaves], Leaves]]:
        """The same: sums of directions have no factors to share."""
        return self.batch(lo, hi, sides), lambda row: row

    def _row(self, i: int, side: float) -> Leaves:
        return self._at(i, side)

    def _at(self, i: int | slice, side: float) -> Leaves:
        j, space = SIDES.index(side), self.directions.space
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


def evaluate(objective: Objective, recipe: Recipe, points: Particles, seed: int, pairs: int | None = None) -> Values:
    """Have an evaluator call the window at the center and at pairs of particles.

    Args:
        objective: the window.
        recipe: the evaluator.
        points: the particles.
        seed: of the random state that the window sees.
        pairs: how many; None for all.

    Returns:
        The values.

    Raises:
        NonFiniteError: if a loss is nan or infinite.
        ValueError: if the evaluator gave another number of values.
    """
    num = len(points) if pairs is None else pairs
    with torch.enable_grad(), FnStream(seed, points.directions.space.device, shared=False) as objective.stream:
        try:
            pieces = iter(recipe.evaluator(objective, points, 0, num))
            center = torch.as_tensor(next(pieces))
            rows = [torch.as_tensor(piece, dtype=torch.float64) for piece in pieces]
        finally:
            objective.stream = None
    objective.commit()
    values = torch.cat([*rows, center.new_empty(0, len(SIDES), len(center))])
    if values.shape[0] != num:
        raise ValueError(f"the evaluator must yield {num} directions of values, got {values.shape[0]}.")
    result = Values(center[0], center[1:], values[..., 0], values[..., 1:])
    _check(result, objective.name)
    return result


def _check(values: Values, name: str) -> None:
    if not torch.isfinite(values.loss):
        raise NonFiniteError(f"{name} returned a loss that is not finite at the parameters: {values.loss.item()}.")
    bad = (~torch.isfinite(values.losses)).nonzero().tolist()
    if bad:
        where = ", ".join(f"{i} ({'+-'[j]})" for i, j in bad[:8])
        raise NonFiniteError(
            f"{name} returned a loss that is not finite at {len(bad)} of {values.losses.numel()} particles: at pair "
            f"{where}{', ...' if len(bad) > 8 else ''}. A gradient from them would be wrong; return a finite penalty."
        )


class WindowRecipe(Recipe):
    """A recipe whose estimates have a first derivative only."""

    def no_curvature(self, *, scalar: bool) -> str | None:
        """Why."""
        del scalar
        return "the loss of a window depends on perturbations of earlier ones, whose second derivative is not made"


class WindowPlan(Plan):
    """One call of an estimator of unrolled systems, in the place of an ordinary estimate.

    Args:
        plan: its parts, as those of an ordinary estimate.
        rule: the estimator's.
        seed: of this window.
    """

    __slots__ = ("_center", "_held", "_rule", "_seed", "_states", "values", "weights")

    def __init__(self, plan: Plan, rule: Rule, seed: int) -> None:
        super().__init__(plan.setup, plan.fn, plan.arguments, plan.habits)
        self._rule, self._seed = rule, seed
        self.values: Values | None = None

    def begin(self, center: torch.Tensor, states: torch.Tensor | None, held: torch.Tensor | None) -> None:
        """Take the packed states of the center and of the particles, None for the same, and the weights so far."""
        num = self.setup.recipe.num_samples
        self._center, self._held = center, held
        self._states: torch.Tensor = center.expand(num, len(SIDES), -1) if states is None else states

    def offsets(self, tensors: Sequence[torch.Tensor], center: torch.Tensor, num: int) -> torch.Tensor:
        """The packed states after 0, 1, ... ``num - 1`` windows at the parameters."""
        states, recipe, space = [center], self.setup.recipe, self.setup.space
        for k in range(num - 1):
            self.begin(states[-1], None, None)
            objective, params = self._objective(tensors)
            seed = derive(self._seed, 1, k)
            nowhere = center.new_empty(recipe.num_samples, len(SIDES), 0)
            points = Particles(params, states[-1], recipe.directions(space, seed), recipe.sigma, nowhere, nowhere)
            with Tally(objective.name, 1) as tally:
                objective.counted = tally.count if tally.trackers else None
                states.append(evaluate(objective, recipe, points, seed, pairs=0).center)
        return torch.stack(states)

    def _objective(self, tensors: Sequence[torch.Tensor]) -> tuple[Objective, Leaves]:
        """The window as evaluators call it, and the parameters."""
        leaves = self.arguments.leaves.copy()
        for k, position in self.setup.others:
            leaves[position] = tensors[k].detach()
        params = tuple([tensors[k].detach() for k in self.setup.chosen])
        arguments = type(self.arguments)(self.arguments.form, self.arguments.spec, leaves, self.arguments.chosen)
        return Objective(self.fn, arguments, (*params, self._center), self.habits), params

    def estimate(self, tensors: Sequence[torch.Tensor], structure: Callable[[Sequence[Any]], Any] = tuple) -> Estimate:
        """Perturb, evaluate and sum."""
        if self.values is not None:
            raise RuntimeError(f"`torch.vmap` over a window of {self.fn} cannot be: its particles have one state each.")
        recipe, space = self.setup.recipe, self.setup.space
        objective, params = self._objective(tensors)
        warn_below_resolution(params, recipe.sigma, "unrolled")
        with Tally(objective.name, recipe.evaluations) as tally:
            objective.counted = tally.count if tally.trackers else None
            directions = recipe.directions(space, self._seed)
            shifts, self.weights = self._rule(self._held, functools.partial(draw, directions))
            points = Particles(params, self._center, directions, recipe.sigma, shifts, self._states)
            self.values = evaluate(objective, recipe, points, self._seed)
            flat = self._gradient(self.values.losses)
            evaluations = recipe.evaluations + objective.repeated
            value = self.values.loss.to(space.dtype)
            if tally.trackers:
                tally.finish(self._seed, value.item(), flat.norm().item(), evaluations=evaluations, failures=0)
        evidence = Evidence(recipe, [self.values.losses], self.values.loss)
        return Estimate(
            value, directions, recipe.sigma, self._seed, evaluations, 0, [self.values.losses], flat, evidence, structure
        )

    def keep(self, result: Estimate) -> int:
        """Nothing: backward needs the gradient alone."""
        del result
        return 0

    def _gradient(self, losses: torch.Tensor) -> torch.Tensor:
        """The mean over particles of weight times loss, by the difference and the mean of each pair."""
        space, recipe = self.setup.space, self.setup.recipe
        half = torch.stack([losses[:, 0] - losses[:, 1], losses[:, 0] + losses[:, 1]]).to(space.dtype) / 2
        plus, minus = self.weights.unbind(1)
        with full_precision(space.device):
            flat = torch.mv((plus - minus).t(), half[0])
            together = plus + minus
            if together.any():  # pairs of which one side has begun anew; in all others the mean cancels
                flat += torch.mv(together.t(), half[1])
        flat /= 2 * len(losses)
        for leaf, sigma in zip(space.split(flat), recipe.sigma, strict=True):
            leaf /= sigma
        check_gradient(flat)
        return flat
