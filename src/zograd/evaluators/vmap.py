"""Many directions in one call of ``fn``, vectorized by ``torch.vmap``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zograd.evaluators.base import Evaluator, check_chunk_size, check_prefetch, default_chunk, fitting_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd.evaluators.base import Piece
    from zograd.evaluators.objective import Objective
    from zograd.evaluators.points import Points


class Vmap(Evaluator, name="vmap"):
    """Evaluate many directions at once with ``torch.vmap``: for an ``fn`` of torch operations on small parameters.

    Random functions of torch inside ``fn`` give each direction its own numbers, and both sides of a pair the same.

    Args:
        chunk_size: directions in one call; None chooses by the number of parameters and the cache. Memory is this many
            times what one call needs.

        prefetch: whether a second thread makes the directions of the next chunk while ``fn`` runs; None does so where
            it gains, see :class:`Loop`.

    Raises:
        TypeError: if ``chunk_size`` is not an int, or ``prefetch`` neither a bool nor None.
        ValueError: if ``chunk_size`` is below 1.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(num_samples=1000, evaluator=zograd.evaluators.Vmap(chunk_size=100))
        ... def fn(x):
        ...     return torch.sign(x).sum()
        >>> fn.estimate(torch.zeros(3)).evaluations
        1001
    """

    def __init__(self, chunk_size: int | None = None, *, prefetch: bool | None = None) -> None:
        self.chunk_size: int | None = check_chunk_size(chunk_size, "Vmap")
        self.prefetch: bool | None = check_prefetch(prefetch, "Vmap")

    def __call__(
        self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None, *, center: bool = True
    ) -> Iterator[Piece]:
        """Yield chunk by chunk."""
        if center:
            yield fn.center(points.center())
        points.directions.prefetch = self.prefetch
        for start, stop in points.spans(self.chunk_size or default_chunk(points), lo, hi):
            yield self._values(fn, points, start, stop)

    def _values(self, fn: Objective, points: Points, lo: int, hi: int) -> torch.Tensor:
        sides, shared = points.sides, fn.stream is not None and fn.stream.shared
        if (shared or not fn.habits.draws) and len(sides) * (hi - lo) <= fitting_rows(points):
            # All sides in one call, which must not draw unless they all draw the same.
            rows = _side(fn, points, lo, hi, sides, "same" if shared else "error")
            if rows is not None:
                return rows.view(len(sides), hi - lo, *rows.shape[1:]).transpose(0, 1)
        randomness = "same" if shared else "different"
        columns = [_side(fn, points, lo, hi, (side,), randomness) for side in sides]
        return torch.stack([column for column in columns if column is not None], dim=1)


def _side(
    fn: Objective, points: Points, lo: int, hi: int, sides: tuple[float, ...], randomness: str
) -> torch.Tensor | None:
    """The values side after side; None if ``fn`` drew although it should not."""
    if points.directions.distribution.factored:
        rows, point = points.factors(lo, hi, sides)
    else:
        rows, point = points.batch(lo, hi, sides), None
    try:
        return fn.many(rows, lo, vmapped=True, randomness=randomness, point=point)
    except RuntimeError as error:
        if randomness == "error" and "randomness error mode" in str(error):
            fn.habits.draws = True
            fn.repeated += rows[0].shape[0]
            return None
        if not _concerns_vmap(error):
            raise
        raise RuntimeError(
            f'{fn.name} cannot be vectorized by `evaluator="vmap"`: use `evaluator="loop"`, which calls it point '
            f"by point. torch said: {error}"
        ) from error


def _concerns_vmap(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)


_SIGNS = (
    "vmap",
    "functorch",
    "batchedtensor",
    "batching rule",
    "doesn't have storage",  # of `numpy()`, `tolist()` and `data_ptr()`
    "match the broadcast shape",  # of writing in place to a tensor that all directions share; the center could
)
