"""Many directions in one call of ``fn``, vectorized by ``torch.vmap``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zograd.evaluators.base import Evaluator, check_chunk_size, check_prefetch, default_chunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd._objective import Objective
    from zograd._points import Points
    from zograd.evaluators.base import Piece

__all__ = ["Vmap"]


class Vmap(Evaluator):
    """Evaluate many directions at once with ``torch.vmap``: for an ``fn`` of torch operations on small parameters.

    Random functions of torch inside ``fn`` give each direction its own numbers, and both sides of a pair the same.

    Args:
        chunk_size: directions in one call; None chooses by the number of parameters and the cache. Memory is this many
            times what one call needs.

        prefetch: whether a second thread makes the directions of the next chunk while ``fn`` runs; None does so where
            it gains, see :class:`Loop`.

    Raises:
        TypeError: if ``chunk_size`` is not an int, or ``prefetch`` neither a bool nor None.
        ValueError: if it is below 1.

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
        shared = fn.stream is not None and fn.stream.shared
        points.directions.prefetch = self.prefetch
        for start, stop in points.spans(self.chunk_size or default_chunk(points), lo, hi):
            sides = [self._side(fn, points, start, stop, side, shared=shared) for side in points.sides]
            yield torch.stack(sides, dim=1)

    def _side(self, fn: Objective, points: Points, lo: int, hi: int, side: float, *, shared: bool) -> torch.Tensor:
        batch = points.batch(lo, hi, side)
        try:
            return fn.many(batch, lo, hi, vmapped=True, randomness="same" if shared else "different")
        except RuntimeError as error:
            if not _concerns_vmap(error):
                raise
            raise RuntimeError(
                f'{fn.name} cannot be vectorized by `evaluator="vmap"`: use `evaluator="loop"`, which calls it point '
                f"by point. torch said: {error}"
            ) from error


def _concerns_vmap(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("vmap", "functorch", "batchedtensor", "batching rule"))
