"""The noise floor of a function."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zograd.diagnostics.function.subject import Subject

_LINE = 9  # points of the difference table
_STEP = 64.0  # units in the last place between them


@dataclass(frozen=True)
class Noise:
    """Noise that stays in a difference of two values with one random state.

    Attributes:
        level: the standard deviation of a value.
        kind: ``"none"``, ``"round-off"``, ``"steps"`` (of a function that jumps) or ``"random"``.
    """

    level: float
    kind: str


def noise_floor(subject: Subject, seed: int, *, repeatable: bool) -> Noise:
    """Measure the noise that stays in a difference of two values with one random state.

    For a function that repeats itself this is that of its arithmetic, by the difference table of Moré and Wild (2011),
    doi:10.1137/100786125: along a line of tiny steps the differences of high order see the noise and nothing else.

    Returns:
        Its level and kind.
    """
    if not repeatable:
        values = [subject.value(seed=1) for _ in range(_LINE)]
        return Noise(statistics.stdev(values), "random")
    leaves, generator = subject.params, torch.Generator().manual_seed(seed)
    line = [torch.randn(p.shape, generator=generator, dtype=subject.space.dtype).to(p.device) for p in leaves]
    eps = max(torch.finfo(p.dtype).eps for p in leaves)
    step, offsets = _STEP * eps * subject.size, range(-(_LINE // 2), _LINE // 2 + 1)
    points = [tuple((p.to(e) + k * step * e).to(p.dtype) for p, e in zip(leaves, line, strict=True)) for k in offsets]
    values = [subject.value(point, seed=1) for point in points]
    level = _table(values)
    # Rounding takes a few digits of a value, and not half of them.
    most = max(map(abs, values)) * math.sqrt(eps)
    return Noise(level, "none" if not level else "round-off" if level <= most else "steps")


def _table(values: list[float]) -> float:
    """Return the noise level by the first order of differences at which three agree within a factor of four."""
    levels, signs, row = [], [], values
    for k in range(1, len(values) - 2):
        row = [b - a for a, b in itertools.pairwise(row)]
        gamma = math.factorial(k) ** 2 / math.factorial(2 * k)
        levels.append(math.sqrt(gamma * statistics.fmean(d * d for d in row)))
        signs.append(min(row) < 0 < max(row))
    for k in range(len(levels) - 2):
        three = levels[k : k + 3]
        if signs[k] and max(three) <= 4 * min(three):
            return levels[k]
    return min(levels)
