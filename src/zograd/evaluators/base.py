"""The contract of evaluators: how ``fn`` is called on points."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from zograd._base import checks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd.evaluators.objective import Objective
    from zograd.evaluators.points import Points

Piece: TypeAlias = "torch.Tensor | list[list[float]]"

EVALUATORS: dict[str, type[Evaluator]] = dict.fromkeys(("loop", "vmap", "batched"))  # type: ignore[assignment]
"""The evaluators that ``evaluator=`` accepts by name."""

_CACHE = 1 << 19  # values of a chunk: three times as many floats fill about 6 MiB of a last-level cache

_PARTS = 8  # of a device's free memory: direction, point and as much for results, half left to others
_SHARING = 16  # points that share their parameters: best or near it for networks of 10 thousand to 10 million of them


class Evaluator(ABC):
    """Calls ``fn`` on points and yields the values in order, in pieces of any size.

    It owns the chunks and knows nothing of coefficients or sums; the estimator owns those and knows nothing of chunks.
    """

    def __init_subclass__(cls, name: str | None = None, **keywords: Any) -> None:
        """Let ``evaluator=name`` mean one of this class."""
        super().__init_subclass__(**keywords)
        if name is not None:
            EVALUATORS[name] = cls

    batched: bool = False
    """Whether ``fn`` itself takes a leading axis of parameter sets."""

    @abstractmethod
    def __call__(
        self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None, *, center: bool = True
    ) -> Iterator[Piece]:
        """Evaluate directions ``lo`` to ``hi``.

        Args:
            fn: the objective; ``fn.center`` evaluates the center, ``fn(point, i)`` one point of direction i,
                ``fn.many`` the points of many directions at once.
            points: where.
            lo: the first direction.
            hi: one past the last; None for all.
            center: whether to begin with the center.

        Yields:
            First the center's value, of shape ``out``, if asked for; then float64 values of shape
            ``(directions, sides, *out)``, any number of directions at a time, in order, each exactly once. Rows of
            Python floats will do in place of a tensor where ``fn`` returns one value.

        An evaluator that knows values before it yields them calls ``fn.arrived(i, j, value)`` for direction i and the
        side ``points.sides[j]``, unless ``fn.arrived`` is None: a journal writes them down. One that has ``fn`` called
        by others, past ``fn`` here, says so by ``fn.count(evaluations)`` as the calls begin.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{k.lstrip('_')}={v!r}" for k, v in self.__dict__.items() if v is not None)
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(type(self))


def as_evaluator(inner: Evaluator | str, typed: str) -> Evaluator:
    """The evaluator of a name, or the evaluator itself.

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
    if not isinstance(inner, str):
        raise TypeError(f"`{typed}` must be an Evaluator or a name, got {type(inner).__name__} {inner!r:.80}.")
    if inner not in EVALUATORS:
        raise ValueError(f"`{typed}` must be one of {', '.join(map(repr, EVALUATORS))} or an Evaluator, got {inner!r}.")
    return EVALUATORS[inner]()


def check_chunk_size(chunk_size: int | None, name: str) -> int | None:
    """Refuse a chunk that holds nothing."""
    return checks.integer(chunk_size, f"`{name}(chunk_size=...)`", least=1, none=True)


def check_prefetch(prefetch: bool | None, name: str) -> bool | None:
    """Refuse what is neither a bool nor None."""
    checks.boolean(prefetch, f"`{name}(prefetch=...)`", none=True)
    return prefetch


def default_chunk(points: Points) -> int:
    """Directions in a call: about as many as the cache holds with their points and results, in calls of equal size."""
    num, block = len(points), points.directions.block
    fitting = fitting_rows(points)
    if points.directions.distribution.factored:  # all sides come in one call
        fitting = max(1, fitting // len(points.sides))
    even = math.ceil(num / max(1, round(num / fitting)))
    return even if even < block else math.ceil(even / block) * block


def fitting_rows(points: Points) -> int:
    """Points whose values, with those of their directions and results, fit into the cache, or the device's memory."""
    space = points.directions.space
    if points.directions.distribution.factored:
        return _SHARING  # their results are what takes room, of which nothing is known
    # Some kinds of device, Apple's for one, do not tell what memory is free.
    info = None if space.device.type == "cpu" else getattr(torch.get_device_module(space.device), "mem_get_info", None)
    if info is None:
        return max(1, _CACHE // space.size)
    free, _ = info(space.device)
    return max(1, int(free) // (_PARTS * space.size * space.dtype.itemsize))
