"""Shaping: pure functions from the values of an estimate to values of the same shape.

A shaping sees the float64 values of all directions at once, as ``(directions, sides)`` with the center left out (for a
scheme that uses the center, minus the center's value), and returns values of that shape. The scheme's weights are
applied to what it returns. The value that the decorated function returns is never shaped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

__all__ = ["Shaping", "leave_one_out"]

Shaping: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def leave_one_out(values: torch.Tensor) -> torch.Tensor:
    r"""Subtract from each direction's values the mean value of all *other* directions.

    .. math:: \tilde F_{ij} = F_{ij} - \frac{1}{(N - 1) J} \sum_{k \ne i} \sum_j F_{kj}

    The baseline is independent of direction i, so the estimate keeps its mean; a baseline that included direction i
    would shrink the gradient by 1 - 1/N. It is for :data:`~zograd.schemes.NAIVE`, whose variance grows with the square
    of the objective's level; for schemes whose weights sum to zero it cancels and changes nothing.

    Args:
        values: of shape ``(directions, sides)``; two directions at least, since one has no others.

    Returns:
        Values of the same shape.

    Raises:
        ValueError: if there is one direction only.

    Examples:
        >>> leave_one_out(torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)).squeeze()
        tensor([-3.0000, -1.5000,  4.5000], dtype=torch.float64)

    References:
        Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (ICLR 2019 workshop).
    """
    num, sides = values.shape
    if num < 2:
        raise ValueError("`leave_one_out` needs the values of other directions: `num_samples` must be >= 2, got 1.")
    rows = values.sum(dim=1, keepdim=True)
    return values - (rows.sum() - rows) / ((num - 1) * sides)
