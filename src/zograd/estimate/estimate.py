r"""The estimator: values at points to a gradient.

.. code-block:: text

    points_ij  = theta + sigma * c_j * eps_i        the scheme's offsets, the distribution's directions
    values_ij  = fn(points_ij)                      an evaluator: values only, no calculus
    coeff_i    = sum_j w_j * values_ij              the scheme's weights; shaping may transform the values first
    gradient   = mean_i coeff_i * eps_i / sigma     Contraction, the only place that sums directions
"""

from __future__ import annotations

from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.streams import FnStream
from zograd.distributions.directions import Directions
from zograd.distributions.sums import Contraction, contract
from zograd.estimate.checks import (
    all_finite,
    check_center,
    check_gradient,
    check_survivors,
    not_finite,
    warn_below_resolution,
    warn_of_dropped,
)
from zograd.estimate.evidence import Evidence, finite_rows, joined, surviving, tensor_of
from zograd.estimate.result import Estimate
from zograd.estimate.second_order import by_direction
from zograd.estimate.statistics import Groups, spread
from zograd.estimate.surrogate import ControlVariate, Surrogate
from zograd.evaluators.points import Points
from zograd.failures import dropping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zograd._base.trees import Space
    from zograd.distributions.sums import Coefficients
    from zograd.estimate.settings import Recipe
    from zograd.evaluators.base import Piece
    from zograd.evaluators.objective import Objective
    from zograd.sampling import Until
    from zograd.schemes import Scheme

_FEW = 16  # rows of Python floats up to which plain arithmetic is faster than tensors; the bits are the same


def estimate(
    objective: Objective, recipe: Recipe, space: Space, seed: int, structure: Callable[[Sequence[Any]], Any] = tuple
) -> Estimate:
    """Estimate the gradient of an objective at its parameters.

    Args:
        objective: the function, with the parameters in ``objective.params``.
        recipe: scheme, distribution, evaluator and their settings.
        space: the layout of the parameters.
        seed: what the directions and the random state of ``fn`` are a function of.
        structure: what makes the user's structure of a tuple of leaves.

    Returns:
        The estimate.

    Raises:
        NonFiniteError: if a value is nan or infinite.
        EvaluationError: if ``fn`` raises at a point, or too few directions survive.
        ValueError: if the evaluator's values do not fit together.
    """
    warn_below_resolution(objective.params, recipe.sigma, "zero_order")
    directions = recipe.directions(space, seed)
    points = Points(objective.params, directions, recipe.sigma, recipe.scheme.sides)
    # User code needs grad mode, whoever calls us: an inner training loop is the main use.
    with torch.enable_grad(), FnStream(seed, space.device, shared=recipe.scheme.uses_center) as objective.stream:
        try:
            coefficients, flat, evidence, directions = _run(objective, recipe, points)
            if recipe.surrogate is not None:
                flat = _controlled(recipe.surrogate, objective, points, joined(coefficients), evidence)
        finally:
            objective.stream = None
    objective.commit()
    return Estimate(
        value=objective.value,
        directions=directions,
        sigma=recipe.sigma,
        seed=seed,
        evaluations=1 + len(directions) * len(points.sides) + objective.repeated,
        failures=objective.failures,
        _coefficients=coefficients,
        _flat=flat,
        _evidence=evidence,
        _structure=structure,
    )


def _run(
    objective: Objective, recipe: Recipe, points: Points
) -> tuple[list[Coefficients], torch.Tensor | None, Evidence, Directions]:
    """The coefficients by pieces, the gradient of an objective of one value a slice, the values and the directions."""
    directions, sides = points.directions, points.sides
    space = directions.space
    pieces = recipe.evaluator(objective, points) if recipe.until is None else _rounds(objective, recipe, points)
    try:
        center = next(pieces, None)
        if not isinstance(center, torch.Tensor):
            raise ValueError(f"the evaluator must yield the center's value first, a tensor, got {center!r:.80}.")
        check_center(center, space, recipe, objective)
        drop = dropping(recipe.failures)
        single = center.numel() == space.slices  # one value, or one a slice
        waits = bool(recipe.shaping or drop or recipe.until)  # for the last value
        contraction = Contraction(directions, recipe.sigma) if single and not waits else None
        kept: list[Coefficients] = []
        seen: list[Piece] = []
        hi = lost = 0
        for piece in _whole(pieces, points, center, recipe.until):
            lo, hi = hi, hi + len(piece)
            coefficients = _combine(recipe.scheme, piece, center)
            if not all_finite(coefficients):  # a value that is not finite makes its coefficient so
                if drop is None:
                    raise not_finite(tensor_of(piece), lo, sides, objective.name)
                lost += int((~finite_rows(tensor_of(piece))).sum())
                check_survivors(drop, lost, len(points), objective.name)
            seen.append(piece)
            if waits:
                continue
            kept.append(coefficients)
            if contraction is not None:
                contraction.add(coefficients)
    finally:
        if isinstance(pieces, GeneratorType):  # let it clean up now, not when it is collected
            pieces.close()
    if waits:
        directions = directions.first(hi)
        if drop and recipe.until:
            check_survivors(drop, lost, hi, objective.name)
        survivors = surviving(joined(seen), center, recipe)
        kept = [survivors]
        if lost:
            warn_of_dropped(lost, hi, objective.name)
        flat = contract(directions, recipe.sigma, survivors) if single else None
    else:
        flat = None if contraction is None else contraction.result()
    if flat is not None:
        check_gradient(flat)
    return kept, flat, Evidence(recipe, seen, center), directions


def _whole(pieces: Iterator[Piece], points: Points, center: torch.Tensor, until: Until | None) -> Iterator[Piece]:
    """The pieces, checked to be the evaluator's whole and in shape."""
    seen, wanted = 0, (len(points.sides), *center.shape)
    for piece in pieces:
        seen += len(piece)
        shapes = {(len(row),) for row in piece} if isinstance(piece, list) else {tuple(piece.shape[1:])}
        if shapes != {wanted} or seen > len(points):
            got = " and ".join(str((len(piece), *shape)) for shape in shapes)
            raise ValueError(
                f"the evaluator must yield {len(points)} directions of values of shape {wanted}, got a piece of shape "
                f"{got} that ends at direction {seen}."
            )
        yield piece
    if seen < len(points) and until is None:
        raise ValueError(f"the evaluator must yield {len(points)} directions of values, got {seen}.")


def _combine(scheme: Scheme, piece: Piece, center: torch.Tensor) -> Coefficients:
    if isinstance(piece, list) and len(piece) <= _FEW:
        level = center.item()
        return [scheme.difference(row, level) for row in piece]
    return scheme.combine(tensor_of(piece), center)


def _rounds(objective: Objective, recipe: Recipe, points: Points) -> Iterator[Piece]:
    """The center and the values of ever more directions, until the gradient from them is good enough."""
    until, directions = recipe.until, points.directions
    assert until is not None
    typed = f"`zero_order(num_samples={until})`"
    group = directions.distribution.group(directions.space, directions.num)
    Groups(directions, recipe.sigma).check(typed)
    lo, hi = 0, until.first(group)
    seen: list[Piece] = []
    center = torch.zeros(())
    while True:
        pieces = recipe.evaluator(objective, points, lo, hi, center=not lo)
        if not lo:
            center = tensor_of(next(pieces))
            yield center
            if center.numel() != directions.space.slices:
                raise ValueError(f"{typed} is for objectives of one value, got the shape {tuple(center.shape)}.")
        for piece in pieces:
            seen.append(piece)
            yield piece
        if hi == until.bound:
            return
        evidence, some = Evidence(recipe, seen, center), directions.first(hi)
        rows = by_direction(surviving(joined(seen), center, recipe), directions.space)
        groups = Groups(some, recipe.sigma, evidence.alive)
        snr = spread(groups, rows, contract(some, recipe.sigma, rows)).snr if groups.count > 1 else 0.0
        if snr >= until.snr:
            return
        lo, hi = hi, until.following(hi, snr, group)


def _controlled(
    surrogate: Callable[..., Any],
    objective: Objective,
    points: Points,
    coefficients: torch.Tensor,
    evidence: Evidence,
) -> torch.Tensor:
    """The flat gradient with the surrogate's part, from which the evidence tells its error."""
    if coefficients.dim() > 1:
        raise ValueError(
            "`zero_order(surrogate=...)` is for objectives of one value, got the shape "
            f"{tuple(coefficients.shape[1:])} from {objective.name}."
        )
    recipe = evidence.recipe
    approximation = Surrogate(surrogate, objective, points, recipe.evaluator)
    evidence.control = ControlVariate(approximation, points, recipe.scheme, coefficients)
    check_gradient(evidence.control.mean)
    return evidence.control.mean
