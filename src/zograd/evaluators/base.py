"""The contract of evaluators: how ``fn`` is called on points; and the plain one, one call after the other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from zograd._base import checks
from zograd._base.execution import free_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd.evaluators.task.answer import Answer
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points

EVALUATORS: dict[str, type[Evaluator]] = dict.fromkeys(("loop", "vmap", "batched"))  # type: ignore[assignment]
"""The evaluators that ``evaluator=`` accepts by name."""

_CACHE = 1 << 19  # values of a chunk: three times as many floats fill about 6 MiB of a last-level cache

_PARTS = 8  # of a device's free memory: direction, point and as much for results, half left to others
_SHARING = 16  # points that share their parameters: best or near it for networks of 10 thousand to 10 million of them


class Evaluator(ABC):
    """A map from points to values: it decides how ``fn`` is called, and knows nothing of coefficients or sums.

    A subclass defines :meth:`values`. ``fn`` and ``points`` pickle, so that an evaluator for another engine sends both
    to its workers, which call ``fn.evaluate(points, lo, hi)``, and hands their answers on unopened.
    """

    batched: bool = False
    """Whether ``fn`` itself takes a leading axis of parameter sets."""

    def __init_subclass__(cls, name: str | None = None, **keywords: Any) -> None:
        """Let ``evaluator=name`` mean one of this class."""
        super().__init_subclass__(**keywords)
        if name is not None:
            EVALUATORS[name] = cls

    def center(self, fn: Objective, points: Points) -> Answer:
        """Evaluate the parameters themselves: by default here, in one plain call.

        Args:
            fn: the objective.
            points: those of the estimate.

        Returns:
            The answer.
        """
        return fn.center(points, batched=self.batched)

    @abstractmethod
    def values(self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None) -> Iterator[Answer]:
        """Evaluate the points of directions ``lo`` to ``hi``.

        Args:
            fn: the objective; ``fn.evaluate(points, lo, hi)`` evaluates the points of some directions.
            points: where.
            lo: the first direction.
            hi: one past the last; None for all.

        Yields:
            Answers with float64 values of shape ``(directions, offsets, *out)``, for any number of directions at a
            time, in order, each direction exactly once. One with an error may come before all others.

        An evaluator that knows values before it yields them calls ``fn.arrived(number, value)`` with the number of the
        point, unless ``fn.arrived`` is None: a journal writes them down.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{k.lstrip('_')}={v!r}" for k, v in self.__dict__.items() if v is not None)
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(type(self))


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


def as_evaluator(inner: Any, typed: str) -> Evaluator:
    """Return the evaluator of a name, or the evaluator itself.

    Args:
        inner: what the user gave.
        typed: the call, for errors.

    Returns:
        The evaluator.

    Raises:
        TypeError: if it is neither.
        ValueError: if the name is unknown.
    """
    if isinstance(inner, Evaluator):
        return inner
    if isinstance(inner, type) and issubclass(inner, Evaluator):
        raise TypeError(f"`{typed}` must be an instance, got the class {inner.__name__}: add `()`.")
    if not isinstance(inner, str):
        raise TypeError(f"`{typed}` must be a name or an Evaluator, got {type(inner).__name__} {inner!r:.80}.")
    if inner not in EVALUATORS:
        raise ValueError(
            f"`{typed}` must be one of {', '.join(map(repr, EVALUATORS))} or an Evaluator, such as "
            f"`zograd.evaluators.Pool(workers=4)`, got {inner!r}."
        )
    return EVALUATORS[inner]()


def default_chunk(points: Points) -> int:
    """Return how many directions go into a call: about as many as the cache holds, in calls of equal size."""
    num, block = len(points.directions), points.directions.block
    fitting = fitting_rows(points)
    if points.directions.distribution.factored:  # all sides come in one call
        fitting = max(1, fitting // len(points.offsets))
    even = math.ceil(num / max(1, round(num / fitting)))
    return even if even < block else math.ceil(even / block) * block


def fitting_rows(points: Points) -> int:
    """Return how many points fit, with their directions and results, into the cache or the device's memory."""
    space = points.directions.space
    if points.directions.distribution.factored:
        return _SHARING  # most memory goes to their results, of which nothing is known
    free = None if space.device.type == "cpu" else free_memory(space.device)
    if free is None:
        return max(1, _CACHE // space.size)
    return max(1, free // (_PARTS * space.size * space.dtype.itemsize))
