r"""One estimate, from the parameters to the gradient. Read it from top to bottom.

.. code-block:: text

    points_ij  = theta + sigma * c_j * eps_i        the scheme's offsets c_j, the distribution's directions eps_i
    values_ij  = fn(points_ij)                      an evaluator: values only, no calculus
    coeff_i    = sum_j w_j * values_ij              the scheme's weights w_j; a shaping may transform the values first
    gradient   = mean_i coeff_i * eps_i / sigma     the only sum over directions
"""

from __future__ import annotations

from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.trees import one_per_slice
from zograd.distributions.directions import Directions, WeightedMean, contract
from zograd.estimate.result import Estimate
from zograd.estimate.settings import (
    check_center,
    check_coefficients,
    check_gradient,
    check_survivors,
    combine,
    finite_rows,
    leaves_unread,
    survivors,
    warn_of_dropped,
)
from zograd.estimate.statistics import Groups, spread
from zograd.estimate.surrogate import control_variate
from zograd.evaluators.task.points import PerturbedPoints, warn_below_resolution

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zograd._base.trees import Leaves, Space
    from zograd.estimate.settings import Settings
    from zograd.evaluators.base import Evaluator
    from zograd.evaluators.task.answer import Answer
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points


def estimate(
    objective: Objective,
    settings: Settings,
    params: Leaves,
    space: Space,
    seed: int,
    structure: Callable[[Sequence[Any]], Any] = tuple,
) -> Estimate:
    """Estimate the gradient of an objective.

    Args:
        objective: the function.
        settings: what the estimate is made of.
        params: the differentiated leaves, detached.
        space: their layout.
        seed: what the directions and the random state of ``fn`` are a function of.
        structure: makes the user's structure of a tuple of leaves.

    Returns:
        The estimate.

    Raises:
        NonFiniteError: if a value is nan or infinite, or the gradient overflows.
        EvaluationError: if ``fn`` raises at a point, or too few directions survive.
        ValueError: if the evaluator's values do not fit together.
    """
    s = settings
    warn_below_resolution(params, s.sigma, "zero_order")
    directions = Directions(s.distribution, space, seed, s.num_samples)
    points = PerturbedPoints(params, directions, s.sigma, s.scheme.sides)  # theta + sigma * c_j * eps_i
    with objective.estimating(seed, shared=s.scheme.uses_center):
        center, value = objective.take_center(s.evaluator.center(objective, points), points)
        check_center(s, center, space, objective)
        scalar = center.numel() == space.slices  # one value, or one a slice
        mean, values, coefficients, num = WeightedMean(directions, s.sigma), [], [], 0
        for piece in _arriving(s, objective, points, center):  # values_ij = fn(points_ij)
            values.append(piece)
            num += piece.shape[0]
            coefficients.append(combine(s, piece, center))  # sum_j w_j * values_ij
            if scalar:
                mean.add(coefficients[-1])
        if objective.module is not None:
            directions.unread = leaves_unread(s, objective)
        gradient = mean.result(num) if scalar else None  # mean_i coeff_i * eps_i / sigma
        made = Estimate(
            value=value,
            values=values[0] if len(values) == 1 else torch.cat(values),
            coefficients=coefficients[0] if len(values) == 1 else torch.cat(coefficients),
            directions=directions.first(num),
            settings=s,
            evaluations=objective.evaluations,
            failures=objective.failures,
            flat=gradient,
            center=center,
            _structure=structure,
        )
        if s.surrogate is not None:
            control = control_variate(s.surrogate, objective, points, s.evaluator, s.scheme, made.coefficients)
            made.control, made.flat = control, control.mean
    check_gradient(made.flat) if made.flat is not None else check_coefficients(made.coefficients)
    return made


def _arriving(s: Settings, objective: Objective, points: Points, center: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield float64 values (directions, offsets, *out): as they come, or together if coefficients need all of them."""
    arriving = _rounds(s, objective, points, center) if s.until else pieces(s.evaluator, objective, points)
    return arriving if s.shaping is None and s.policy.drop is None else _together(s, objective, points, arriving)


def _together(
    s: Settings, objective: Objective, points: Points, arriving: Iterator[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield all values in one piece, the number of dropped directions looked at as they come."""
    drop, kept, lost = s.policy.drop, [], 0
    for piece in arriving:
        kept.append(piece)
        if drop is not None:
            lost += int((~finite_rows(piece)).sum())
            check_survivors(drop, lost, len(points.directions), objective.name)
    values = kept[0] if len(kept) == 1 else torch.cat(kept)  # a shaping's bits depend on the layout
    if drop is not None and lost:
        check_survivors(drop, lost, len(values), objective.name)
        warn_of_dropped(lost, len(values), objective.name)
    yield values


def _rounds(s: Settings, objective: Objective, points: Points, center: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the values of ever more directions, until the gradient from them is good enough."""
    until, directions = s.until, points.directions
    assert until is not None
    group = directions.distribution.group(directions.space, directions.num)
    Groups(directions, s.sigma).check(f"`zero_order(num_samples={until})`")
    seen: list[torch.Tensor] = []
    lo, hi = 0, until.first(group)
    while True:
        for piece in pieces(s.evaluator, objective, points, lo, hi):
            seen.append(piece)
            yield piece
        if hi == until.bound:
            return
        values, some = torch.cat(seen), directions.first(hi)
        rows = one_per_slice(combine(s, values, center), directions.space)
        groups = Groups(some, s.sigma, survivors(s.policy, values))
        snr = spread(groups, rows, contract(some, s.sigma, rows)).snr if groups.count > 1 else 0.0
        if snr >= until.snr:
            return
        lo, hi = hi, until.following(hi, snr, group)


def pieces(
    evaluator: Evaluator, objective: Objective, points: Points, lo: int = 0, hi: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield an evaluator's values as they come, checked to be whole and in shape.

    Args:
        evaluator: what calls ``fn``.
        objective: the function, with the center's value known.
        points: where.
        lo: the first direction.
        hi: one past the last; None for all.

    Yields:
        float64 of shape (directions, offsets, *out), in order.

    Raises:
        ValueError: if the evaluator yields other directions, or values of another shape.
    """
    answers: Iterator[Answer] = iter(evaluator.values(objective, points, lo, hi))
    wanted = (len(points.offsets), *objective.shape)
    seen, stop = lo, points.directions.num if hi is None else hi
    try:
        for answer in answers:
            piece = objective.take(answer, points)
            seen += piece.shape[0]
            if tuple(piece.shape[1:]) != wanted or seen > stop:
                raise ValueError(
                    f"the evaluator must yield {stop - lo} directions of values of shape {wanted}, got a piece of "
                    f"shape {tuple(piece.shape)} that ends at direction {seen}."
                )
            yield piece
    finally:
        if isinstance(answers, GeneratorType):  # let it clean up now, not when it is collected
            answers.close()
    if seen < stop:
        raise ValueError(f"the evaluator must yield {stop - lo} directions of values, got {seen - lo}.")
