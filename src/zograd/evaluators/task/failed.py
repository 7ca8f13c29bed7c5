"""Which values are those of failed evaluations, and what is said of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zograd.errors import NonFiniteError

if TYPE_CHECKING:
    from typing import TypeAlias

    Value: TypeAlias = float | torch.Tensor

_NAMED = 8  # points that an error lists


def lost(value: Value, rows: int | None) -> int:
    """Return how many of some points have a value that is not finite."""
    if isinstance(value, float):
        return int(not math.isfinite(value))
    finite = torch.isfinite(value)
    return int(not finite.all()) if rows is None else int((~finite.reshape(rows, -1).all(dim=1)).sum())


def completed(kept: Value, value: Value, rows: int | None) -> Value:
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
