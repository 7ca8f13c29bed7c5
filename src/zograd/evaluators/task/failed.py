"""Evaluations that fail: how often they are tried, which of their values are lost, and what is said of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zograd.errors import NonFiniteError
from zograd.failures import is_failure

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from zograd.failures import Policy

    Value: TypeAlias = float | torch.Tensor

_NAMED = 8  # points that an error lists


def repeated(
    evaluate: Callable[[], Value],
    policy: Policy,
    rows: int | None,
    *,
    drops: bool,
    raises: bool,
    count: Callable[[int, int], None],
) -> Value | None:
    """Evaluate one point, or many, as often as a policy says.

    Args:
        evaluate: makes the points and evaluates them.
        policy: how often, and whether what fails then is given up.
        rows: how many points there are, with a row of values each; None for one.
        drops: whether the points may be given up: the center may not.
        raises: whether exceptions of ``fn`` go up as they are.
        count: called with the numbers of retries and failures as they happen.

    Returns:
        The values, those not finite that are given up; None if there are none.
    """
    kept: Value | None = None
    for left in reversed(range(policy.tries)):
        goes_on = left or (drops and policy.drop is not None)
        try:
            value = evaluate()
        except Exception as error:
            if raises or not is_failure(error) or not goes_on:
                raise
            failed = rows or 1
        else:
            kept = value if kept is None else _completed(kept, value, rows)
            if not _lost(kept, rows) or not goes_on:
                return kept
            failed = _lost(value, rows)
        count((rows or 1) if left else 0, failed)
    return kept


def _lost(value: Value, rows: int | None) -> int:
    """Return how many of some points have a value that is not finite."""
    if isinstance(value, float):
        return int(not math.isfinite(value))
    finite = torch.isfinite(value)
    return int(not finite.all()) if rows is None else int((~finite.reshape(rows, -1).all(dim=1)).sum())


def _completed(kept: Value, value: Value, rows: int | None) -> Value:
    """Return the new values of points that failed before, the old ones of the others."""
    if rows is None or isinstance(kept, float) or isinstance(value, float):
        return value
    finite = torch.isfinite(kept).reshape(rows, -1).all(dim=1)
    return torch.where(finite.view(rows, *(1,) * (kept.dim() - 1)), kept, value)


def not_finite(values: torch.Tensor, offsets: tuple[float, ...], lo: int, name: str) -> NonFiniteError:
    """Return the error that names the points whose values are not finite."""
    points = (~torch.isfinite(values)).flatten(2).any(dim=2) if values.dim() > 2 else ~torch.isfinite(values)
    where = [f"{lo + i} (offset {offsets[j]:+g})" for i, j in points.nonzero()[:_NAMED].tolist()]
    count, hi = int(points.sum()), lo + len(values)
    return NonFiniteError(
        f"{name} returned non-finite values at {count} of {points.numel()} points, those of directions {lo} "
        f"to {hi - 1}: at direction {', '.join(where)}{', ...' if count > _NAMED else ''}. A gradient from them "
        "would be wrong; return a finite penalty instead, of the size of the other values."
    )


def center_not_finite(value: torch.Tensor, name: str) -> NonFiniteError:
    """Return the error of a value at the parameters themselves."""
    bad = int((~torch.isfinite(value)).sum())
    return NonFiniteError(
        f"{name} returned {bad} non-finite value{'s' * (bad > 1)} of {value.numel()} at the parameters themselves (the "
        f"center): {value.flatten()[:_NAMED].tolist()}."
    )
