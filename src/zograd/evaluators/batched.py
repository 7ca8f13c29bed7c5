"""Many directions in one call of an ``fn`` that is vectorized by its author."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from zograd._base import checks
from zograd.evaluators.base import Evaluator, default_chunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd.evaluators.task.answer import Answer
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points


class Batched(Evaluator, name="batched"):
    """For an ``fn`` that itself takes a leading axis of parameter sets and returns one value for each.

    The decorated function is called with one parameter set, without that axis; ``fn`` always sees the axis, of length
    one in a plain call and at the center. Draw random numbers by :func:`zograd.current_seeds`, one seed for each set.

    Args:
        chunk_size: directions in one call; None chooses by the number of parameters and the cache.

        prefetch: whether a second thread makes the directions of the next chunk while ``fn`` runs; None does so where
            it gains, see :class:`Loop`.

    Raises:
        TypeError: if ``chunk_size`` is not an int, or ``prefetch`` neither a bool nor None.
        ValueError: if ``chunk_size`` is below 1.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(method="antithetic", num_samples=8, evaluator="batched")
        ... def simulate(x):  # x is (sets, 3)
        ...     return (x.sign() * x).sum(dim=1)
        >>> simulate(torch.ones(3)).shape
        torch.Size([])
    """

    batched = True

    def __init__(self, chunk_size: int | None = None, *, prefetch: bool | None = None) -> None:
        self.chunk_size: int | None = checks.integer(chunk_size, "`Batched(chunk_size=...)`", least=1, none=True)
        checks.boolean(prefetch, "`Batched(prefetch=...)`", none=True)
        self.prefetch: bool | None = prefetch

    def values(self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None) -> Iterator[Answer]:
        """Evaluate chunk by chunk."""
        points.directions.prefetch = self.prefetch
        for start, stop in points.spans(self.chunk_size or default_chunk(points), lo, hi):
            yield fn.evaluate(points, start, stop, _batched)


def _batched(fn: Objective, points: Points, lo: int, hi: int) -> torch.Tensor:
    """Return the values by one call of ``fn`` for each offset."""
    call = functools.partial(fn.arguments.call, fn.fn)
    makes = [functools.partial(points.rows, lo, hi, (offset,)) for offset in points.offsets]
    return torch.stack([fn.together(call, make, lo, hi - lo) for make in makes], dim=1)
