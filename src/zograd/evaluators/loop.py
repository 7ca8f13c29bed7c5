"""One call of ``fn`` after the other: the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zograd._base import checks
from zograd.evaluators.base import Evaluator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd.evaluators.task.answer import Answer
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points


class Loop(Evaluator, name="loop"):
    """Evaluate point by point, in this thread: works with any ``fn``.

    Args:
        prefetch: whether a second thread makes the next direction while ``fn`` runs, for one more vector of the
            parameters' size; None does so where it gains: from 131072 to 4 million parameters on the CPU, if there is a
            second core. The numbers are the same.

    Raises:
        TypeError: if ``prefetch`` is neither a bool nor None.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(method="antithetic", num_samples=2, evaluator="loop")
        ... def fn(x):
        ...     return float(x.sum())  # nothing that torch could follow
        >>> fn(torch.ones(3, requires_grad=True)).requires_grad
        True
    """

    def __init__(self, prefetch: bool | None = None) -> None:
        checks.boolean(prefetch, "`Loop(prefetch=...)`", none=True)
        self.prefetch: bool | None = prefetch

    def values(self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None) -> Iterator[Answer]:
        """Evaluate block by block, and direction by direction if a policy drops some: it may have to stop early."""
        points.directions.prefetch = self.prefetch
        chunk = points.directions.block if fn.policy.drop is None else 1
        return (fn.evaluate(points, start, stop) for start, stop in points.spans(chunk, lo, hi))
