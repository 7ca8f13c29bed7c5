"""One call of ``fn`` after the other: the reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zograd.evaluators.base import Evaluator, check_prefetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zograd._base.trees import Leaves
    from zograd.evaluators.base import Piece
    from zograd.evaluators.objective import Objective, Value
    from zograd.evaluators.points import Points


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
        self.prefetch: bool | None = check_prefetch(prefetch, "Loop")

    def __call__(
        self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None, *, center: bool = True
    ) -> Iterator[Piece]:
        """Yield block by block, and at once what holds a value that is not finite, since each call may be slow."""
        if center:
            yield fn.center(points.center())
        points.directions.prefetch = self.prefetch
        for start, stop in points.spans(points.directions.block, lo, hi):
            rows: list[list[Value]] = []
            for i, point in enumerate(points.rows(start, stop), start):
                rows.append([_value(fn, point, i, j, side) for j, side in enumerate(points.sides)])
                if not _finite(rows[-1]):
                    yield _stack(rows)
                    rows = []  # a new one: who got the other may keep it
            if rows:
                yield _stack(rows)


def _value(fn: Objective, point: Callable[[float], Leaves], i: int, j: int, side: float) -> Value:
    value = fn(point(side), i)
    if fn.arrived is not None:
        fn.arrived(i, j, value)
    return value


def _finite(row: list[Value]) -> bool:
    for value in row:  # noqa: SIM110 - the generator of `all` takes longer than the comparisons
        if type(value) is float and not math.isfinite(value):
            return False
    return True


def _stack(rows: list[list[Value]]) -> Piece:
    if isinstance(rows[0][0], float):
        return rows  # type: ignore[return-value]
    return torch.stack([torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in row]) for row in rows])
