"""Many directions in one call of an ``fn`` that is vectorized by its author."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zograd.evaluators.base import Evaluator, check_chunk_size, check_prefetch, default_chunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd.evaluators.base import Piece
    from zograd.evaluators.objective import Objective
    from zograd.evaluators.points import Points


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
        self.chunk_size: int | None = check_chunk_size(chunk_size, "Batched")
        self.prefetch: bool | None = check_prefetch(prefetch, "Batched")

    def __call__(
        self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None, *, center: bool = True
    ) -> Iterator[Piece]:
        """Yield chunk by chunk."""
        if center:
            yield fn.center(tuple(leaf.unsqueeze(0) for leaf in points.center()), batched=True)
        points.directions.prefetch = self.prefetch
        for start, stop in points.spans(self.chunk_size or default_chunk(points), lo, hi):
            sides = [fn.many(points.batch(start, stop, (side,)), start, vmapped=False) for side in points.sides]
            yield torch.stack(sides, dim=1)
