"""Many directions in one call of ``fn``, vectorized by ``torch.vmap``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from zograd._base import checks
from zograd.distributions.factored import dense
from zograd.evaluators.base import Evaluator, default_chunk, fitting_rows
from zograd.evaluators.task.returned import as_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd._base.trees import Leaves
    from zograd.evaluators.task.answer import Answer
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points


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
        self.chunk_size: int | None = checks.integer(chunk_size, "`Vmap(chunk_size=...)`", least=1, none=True)
        checks.boolean(prefetch, "`Vmap(prefetch=...)`", none=True)
        self.prefetch: bool | None = prefetch

    def values(self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None) -> Iterator[Answer]:
        """Evaluate chunk by chunk."""
        points.directions.prefetch = self.prefetch
        for start, stop in points.spans(self.chunk_size or default_chunk(points), lo, hi):
            yield fn.evaluate(points, start, stop, _vectorized)


def _vectorized(fn: Objective, points: Points, lo: int, hi: int) -> torch.Tensor:
    """Return values by one call for all offsets if they fit and ``fn`` draws alike at each; else by one for each."""
    offsets = points.offsets
    try:
        if (fn.shared or not fn.facts.draws) and len(offsets) * (hi - lo) <= fitting_rows(points):
            values = in_one_call(fn, points, lo, hi, offsets, "same" if fn.shared else "error")
            if values is not None:
                return values
        randomness = "same" if fn.shared else "different"
        columns = [in_one_call(fn, points, lo, hi, (offset,), randomness) for offset in offsets]
    except RuntimeError as error:
        if not _concerns_vmap(error):
            raise
        raise RuntimeError(
            f'{fn.name} cannot be vectorized by `evaluator="vmap"`: use `evaluator="loop"`, which calls it point '
            f"by point. torch said: {error}"
        ) from error
    return torch.cat([column for column in columns if column is not None], dim=1)


def in_one_call(
    fn: Objective, points: Points, lo: int, hi: int, offsets: tuple[float, ...], randomness: str
) -> torch.Tensor | None:
    """Return the values of directions ``lo`` to ``hi`` at some offsets; None if ``fn`` drew although it must not."""

    # The check for a tensor comes inside: vmap has its own words for anything else.
    def one(row: Leaves) -> torch.Tensor:
        return as_tensor(dense(fn.arguments.call(fn.fn, points.of_factors(row))), fn.name)

    num = (hi - lo) * len(offsets)
    make = functools.partial(points.factors, lo, hi, offsets)
    try:
        by_offset = fn.together(torch.vmap(one, randomness=randomness), make, lo, num, vmapped=True)
    except RuntimeError as error:
        if randomness != "error" or "randomness error mode" not in str(error):
            raise
        fn.facts.draws = True
        fn.count(-num)
        return None
    return by_offset.view(len(offsets), hi - lo, *fn.shape).transpose(0, 1)


def _concerns_vmap(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)


_SIGNS = (
    "vmap",
    "functorch",
    "batchedtensor",
    "batching rule",
    "doesn't have storage",  # of `numpy()`, `tolist()` and `data_ptr()`
    "expand is unsupported for",  # of a sparse tensor that meets many points
    "match the broadcast shape",  # of writing in place to a tensor that all directions share; the center could
)
