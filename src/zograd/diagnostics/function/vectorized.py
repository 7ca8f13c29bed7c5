"""Comparison of ``torch.vmap`` with the function itself, at the same points."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from zograd.diagnostics.function.subject import GivenPoints, Subject
from zograd.evaluators.vmap import in_one_call

if TYPE_CHECKING:
    from zograd._base.trees import Leaves
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points

_ROWS = 8  # points that are evaluated one by one and vectorized
_SHARE = 16  # the part of the budget that the speed of many at once may take
_TRIES = 3
_VMAP_TOLERANCE = 64.0  # roundings: vectorized kernels sum in another order


@dataclass(frozen=True)
class Vectorized:
    """Values and speed of a function under ``torch.vmap``.

    Attributes:
        works: whether it runs.
        error: why not, or None.
        difference: the largest between its values and those of a loop, relative to the values.
        same: whether that is rounding.
        seconds: of one evaluation among several.
        looped: of one by itself.
        warning: torch's, where it has no fast rule for something.
    """

    works: bool
    error: str | None = None
    difference: float = 0.0
    same: bool = False
    seconds: float = math.nan
    looped: float = math.nan
    warning: str | None = None


def vectorized(subject: Subject, sigma: float, level: float, seed: int) -> Vectorized:
    """Evaluate some points one by one and vectorized, under one random state; ``level`` is the noise floor.

    Returns:
        The comparison; what ``fn`` raises at a point by itself is its error.
    """
    if subject.batched:
        return Vectorized(False, 'fn takes many points at once, as `evaluator="batched"` asks')
    try:
        return _compared(subject, sigma, level, seed)
    except Exception as error:  # fn's own, at some point away from the center
        return Vectorized(False, f"fn raised at sigma = {sigma:.2g}: {type(error).__name__}: {error}")


def _compared(subject: Subject, sigma: float, level: float, seed: int) -> Vectorized:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn((_ROWS, *p.shape), generator=generator, dtype=torch.float32) for p in subject.params]
    points = tuple(
        (p + sigma * e.to(p.device, subject.space.dtype)).to(p.dtype) for p, e in zip(subject.params, rows, strict=True)
    )
    objective = subject.objective(judges=False)  # a value that is not finite is compared like any other
    center = GivenPoints(tuple(p.clone() for p in subject.params), ())
    with objective.estimating(seed, shared=True):
        objective.take_center(objective.center(center), center)
        single, times = [], []
        for k in range(_ROWS):
            start = time.perf_counter()
            single.append(_value_of_one(objective, points, k))
            times.append(time.perf_counter() - start)
        looped = min(times)  # others may be at work on this machine
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                many = _values_of_many(objective, points)  # sets things up, too
                seconds = _seconds_of_many(subject, objective, points)
            except Exception as error:  # what vmap, or fn under it, raises
                return Vectorized(False, f"{type(error).__name__}: {error}", looped=looped)
        if _one_draw_for_all(objective, points):
            why = "fn draws random numbers of its own, and one draw would serve all rows"
            return Vectorized(False, why, looped=looped)
    expected = torch.tensor(single, dtype=torch.float64)
    finite = expected[torch.isfinite(expected)]
    size = float(finite.abs().max()) if finite.any() else 1.0
    alike = torch.isclose(many.cpu(), expected, rtol=0.0, atol=0.0, equal_nan=True)  # infinities have no difference
    difference = float((many.cpu() - expected).abs().nan_to_num(nan=math.inf).masked_fill(alike, 0.0).max())
    same = difference <= _VMAP_TOLERANCE * max(torch.finfo(subject.dtype or torch.float32).eps * size, level)
    slow = next((str(w.message) for w in caught if "performance drop" in str(w.message)), None)
    return Vectorized(True, None, difference / size, same, seconds, looped, slow)


def _one_draw_for_all(objective: Objective, points: Leaves) -> bool:
    """Return whether one point has one value in all rows of a call, and another in each call of its own."""
    one, other = (_value_of_one(objective, points, 0) for _ in range(2))
    if one == other:
        return False
    rows = _values_of_many(objective, tuple(p[:1].expand(_ROWS, *p.shape[1:]).clone() for p in points))
    return bool((rows == rows[0]).all())


def _value_of_one(objective: Objective, points: Leaves, k: int) -> float:
    """Return the value at one of the points, by a call of its own."""
    given = GivenPoints(tuple(p[k] for p in points), tuple(p[k : k + 1] for p in points))
    return objective.take(objective.evaluate(given, 0, 1), given).item()


def _values_of_many(objective: Objective, points: Leaves) -> torch.Tensor:
    """Return the values at points with a leading axis, by one vectorized call."""
    given = GivenPoints(tuple(p[0] for p in points), points)

    def how(fn: Objective, points: Points, lo: int, hi: int) -> torch.Tensor:
        return cast("torch.Tensor", in_one_call(fn, points, lo, hi, points.offsets, "same"))

    return objective.take(objective.evaluate(given, 0, len(points[0]), how), given).flatten()


def _seconds_of_many(subject: Subject, objective: Objective, points: Leaves) -> float:
    """Return the least time of one evaluation among many, of three tries."""
    copies = max(1, subject.budget // _SHARE // _ROWS // _TRIES)
    more, times = tuple(torch.cat([p] * copies) for p in points), []
    for _ in range(_TRIES if copies > 1 else 1):
        start = time.perf_counter()
        float(_values_of_many(objective, more).sum())  # waits for an accelerator
        times.append(time.perf_counter() - start)
    return min(times) / (_ROWS * copies)
