"""Questions about a function itself, each answered by a few calls: its values, its pickle, its noise."""

from __future__ import annotations

import itertools
import math
import pickle
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.torch_private import writes
from zograd.diagnostics.function.watch import Picture, RandomStates
from zograd.errors import NonFiniteError

if TYPE_CHECKING:
    from zograd._base.trees import Leaves
    from zograd.diagnostics.function.subject import Subject

_CALLS = 4  # plain ones
_LINE = 9  # points of the difference table
_STEP = 64.0  # units in the last place between them


@dataclass(frozen=True)
class Calls:
    """What plain calls at the parameters show.

    Attributes:
        value: of the first call.
        deterministic: whether all calls gave the same bits.
        repeatable: whether two calls did with torch's random state alike.
        draws: the packages whose global random stream moved, of torch, numpy and python.
        changed: what the first call changed, by name.
        writes_to_point: whether it wrote to its differentiated arguments, of which it gets copies.
        seconds: the median of one call.
        deviation: of the values, if they differ.
    """

    value: float
    deterministic: bool
    repeatable: bool
    draws: tuple[str, ...]
    changed: tuple[str, ...]
    writes_to_point: bool
    seconds: float
    deviation: float


def calls(subject: Subject) -> Calls:
    """Call it some times in the same place, as it comes and with one random state, and watch what it changes."""
    entered: list[Picture] = []  # the other arguments as fn got them
    subject.before = lambda args, kwargs: entered.append(Picture(None, _others(subject, args, kwargs)))
    point, state = tuple(p.clone() for p in subject.params), RandomStates(subject.space.device)
    picture = Picture(subject.fn, subject.beside)
    try:
        first, seconds = _timed(subject, point)
        draws = state.moved()
        changed = (*picture.changed(), *entered[-1].changed())
    finally:
        subject.before = None
    written = not all(map(torch.equal, point, subject.params)) or any(map(_was_written_to, point))
    if not math.isfinite(first):
        raise NonFiniteError(f"{subject.name} returned {first} at the arguments themselves (the center).")
    more = [_timed(subject, None) for _ in range(_CALLS - 1)]
    values = [first, *(value for value, _ in more)]
    alike = [subject.value(seed=1) for _ in range(2)]
    return Calls(
        value=first,
        deterministic=len(set(values)) == 1,
        repeatable=alike[0] == alike[1],
        draws=draws,
        changed=tuple(dict.fromkeys(changed)),
        writes_to_point=written,
        seconds=statistics.median([seconds, *(s for _, s in more)]),
        deviation=statistics.stdev(values),
    )


def _others(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not differentiated, by name."""
    chosen = set(subject.arguments.form.argnums)
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    return {f"argument {i}": x for i, x in named.items() if i not in chosen}


def _was_written_to(leaf: torch.Tensor) -> bool:
    return writes(leaf) > 0 and not leaf.requires_grad


def _timed(subject: Subject, point: Leaves | None) -> tuple[float, float]:
    start = time.perf_counter()
    value = subject.value(point)
    return value, time.perf_counter() - start


@dataclass(frozen=True)
class Pickling:
    """Whether a function reaches another process.

    Attributes:
        works: whether it and its arguments pickle, and what comes back has the same value.
        error: why not, or None.
    """

    works: bool
    error: str | None


def pickling(subject: Subject, expected: float | None) -> Pickling:
    """Pickle what was given and its arguments, and see that what comes back has the same value."""
    try:
        again = pickle.loads(pickle.dumps(subject.given))
        pickle.loads(pickle.dumps([leaf for leaf in subject.arguments.leaves if not isinstance(leaf, torch.Tensor)]))
    except Exception as error:  # whatever an object's own __reduce__ raises
        return Pickling(False, f"{type(error).__name__}: {error}")
    if again is subject.given:
        return _by_name(subject.given)
    if expected is not None and not isinstance(again, torch.nn.Module) and callable(again):
        return _same_after(subject, again, expected)
    return Pickling(True, None)


def _by_name(fn: Any) -> Pickling:
    """A function goes as the name of its place, which a new process has to find."""
    if getattr(fn, "__module__", None) == "__main__" and not hasattr(__import__("__main__"), "__file__"):
        return Pickling(False, "it is defined in an interactive session: put it into a module.")
    return Pickling(True, None)


def _same_after(subject: Subject, again: Any, expected: float) -> Pickling:
    fn, subject.fn = subject.fn, getattr(again, "fn", again)
    try:
        value = subject.value(seed=1)
    except Exception as error:  # fn's own, in a state that it did not choose
        return Pickling(False, f"after a round trip it raises {type(error).__name__}: {error}")
    finally:
        subject.fn = fn
    if value != expected:
        return Pickling(False, f"after a round trip its value is {value:g} where it was {expected:g}.")
    return Pickling(True, None)


@dataclass(frozen=True)
class Noise:
    """How far two values may differ that should be one.

    Attributes:
        level: the standard deviation of a value.
        kind: ``"none"``, ``"round-off"``, ``"steps"`` (of a function that jumps) or ``"random"``.
    """

    level: float
    kind: str


def noise(subject: Subject, found: Calls, seed: int) -> Noise:
    """The noise that stays in a difference of two values with one random state.

    For a function that repeats itself this is that of its arithmetic, by the difference table of Moré and Wild (2011),
    doi:10.1137/100786125: along a line of tiny steps the differences of high order see the noise and nothing else.

    Returns:
        Its level and kind.
    """
    if not found.repeatable:
        values = [subject.value(seed=1) for _ in range(_LINE)]
        return Noise(statistics.stdev(values), "random")
    line, leaves = _unit(subject, seed), subject.params
    size = math.sqrt(sum(float(p.double().square().sum()) for p in leaves) / subject.space.size) or 1.0
    step = _STEP * max(torch.finfo(p.dtype).eps for p in leaves) * size
    points = [tuple((p.to(e) + k * step * e).to(p.dtype) for p, e in zip(leaves, line, strict=True)) for k in _OFFSETS]
    values = [subject.value(point, seed=1) for point in points]
    level = _table(values)
    # Rounding takes a few digits of a value, and not half of them.
    most = max(map(abs, values)) * math.sqrt(max(torch.finfo(p.dtype).eps for p in leaves))
    return Noise(level, "none" if not level else "round-off" if level <= most else "steps")


_OFFSETS = range(-(_LINE // 2), _LINE // 2 + 1)


def _unit(subject: Subject, seed: int) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(p.shape, generator=generator, dtype=subject.space.dtype).to(p.device) for p in subject.params
    )


def _table(values: list[float]) -> float:
    """The noise level by the first order of differences at which three agree within a factor of four."""
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
