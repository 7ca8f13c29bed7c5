"""Single questions to a function, each answered by a few calls."""

from __future__ import annotations

import itertools
import math
import pickle
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from zograd._base.streams import TorchStream, plain_call
from zograd._base.torch_private import writes
from zograd.diagnostics.function.subject import Given, Subject
from zograd.diagnostics.function.watch import Picture, RandomStates
from zograd.errors import NonFiniteError
from zograd.evaluators.task.returned import as_tensor
from zograd.evaluators.vmap import in_one_call

if TYPE_CHECKING:
    from zograd._base.trees import Leaves
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points

PLAIN_CALLS = 4
_ROWS = 8  # points that are evaluated one by one and vectorized
_SHARE = 16  # the part of the budget that the speed of many at once may take
_TRIES = 3
_LINE = 9  # points of the difference table
_STEP = 64.0  # units in the last place between them
_VMAP_TOLERANCE = 64.0  # roundings: vectorized kernels sum in another order


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
    entered: list[Any] = []
    subject.before = lambda args, kwargs: entered.append(_Entered(subject, args, kwargs))
    point, state = tuple(p.clone() for p in subject.params), RandomStates(subject.space.device)
    picture = Picture(subject.fn, subject.beside)
    try:
        first, seconds = _timed(subject, point)
        draws = state.moved()
        changed = (*picture.changed(), *entered[-1].changed())
    finally:
        subject.before = None
    written = not all(map(torch.equal, point, subject.params)) or entered[-1].wrote(point)
    if not math.isfinite(first):
        raise NonFiniteError(f"{subject.name} returned {first} at the arguments themselves (the center).")
    more = [_timed(subject, None) for _ in range(PLAIN_CALLS - 1)]
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


class _Entered:
    """The arguments as fn got them, to be compared with what it leaves."""

    def __init__(self, subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = set(subject.arguments.form.argnums)
        named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        self._others = {f"argument {i}": x for i, x in named.items() if i not in chosen}
        self._picture = Picture(None, self._others)

    def changed(self) -> tuple[str, ...]:
        return self._picture.changed()

    def wrote(self, point: Leaves) -> bool:
        return any(writes(p) > 0 and not p.requires_grad for p in point)


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


@dataclass(frozen=True)
class Vectorized:
    """What ``torch.vmap`` makes of a function.

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


def vmap(subject: Subject, sigma: float, level: float, seed: int) -> Vectorized:
    """Evaluate some points one by one and vectorized, under one random state; ``level`` is the noise floor."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn((_ROWS, *p.shape), generator=generator, dtype=torch.float32) for p in subject.params]
    points = tuple(
        (p + sigma * e.to(p.device, subject.space.dtype)).to(p.dtype) for p, e in zip(subject.params, rows, strict=True)
    )
    objective = subject.objective(judges=False)  # a value that is not finite is compared like any other
    center = Given(tuple(p.clone() for p in subject.params), ())
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
    size = float(expected.abs().max()) or 1.0
    difference = float((many.cpu() - expected).abs().nan_to_num(nan=math.inf).max())
    same = difference <= _VMAP_TOLERANCE * max(torch.finfo(subject.dtype or torch.float32).eps * size, level)
    slow = next((str(w.message) for w in caught if "performance drop" in str(w.message)), None)
    return Vectorized(True, None, difference / size, same, seconds, looped, slow)


def _one_draw_for_all(objective: Objective, points: Leaves) -> bool:
    """Whether one point has one value in all rows of a call, and another in each call of its own."""
    one, other = (_value_of_one(objective, points, 0) for _ in range(2))
    if one == other:
        return False
    rows = _values_of_many(objective, tuple(p[:1].expand(_ROWS, *p.shape[1:]).clone() for p in points))
    return bool((rows == rows[0]).all())


def _value_of_one(objective: Objective, points: Leaves, k: int) -> float:
    """Return the value at one of the points, by a call of its own."""
    given = Given(tuple(p[k] for p in points), tuple(p[k : k + 1] for p in points))
    return objective.take(objective.evaluate(given, 0, 1), given).item()


def _values_of_many(objective: Objective, points: Leaves) -> torch.Tensor:
    """Return the values at points with a leading axis, by one vectorized call."""
    given = Given(tuple(p[0] for p in points), points)

    def vectorized(fn: Objective, points: Points, lo: int, hi: int) -> torch.Tensor:
        return cast("torch.Tensor", in_one_call(fn, points, lo, hi, points.offsets, "same"))

    return objective.take(objective.evaluate(given, 0, len(points[0]), vectorized), given).flatten()


def _seconds_of_many(subject: Subject, objective: Objective, points: Leaves) -> float:
    """The least time of one evaluation among many, of three tries."""
    copies = max(1, subject.budget // _SHARE // _ROWS // _TRIES)
    more, times = tuple(torch.cat([p] * copies) for p in points), []
    for _ in range(_TRIES if copies > 1 else 1):
        start = time.perf_counter()
        float(_values_of_many(objective, more).sum())  # waits for an accelerator
        times.append(time.perf_counter() - start)
    return min(times) / (_ROWS * copies)


@dataclass(frozen=True)
class Gradient:
    """What autograd says, flat; or why it says nothing."""

    flat: torch.Tensor | None
    error: str | None = None


def autograd(subject: Subject, found: Calls, seed: int) -> Gradient:
    """Ask autograd for the gradient at the parameters."""
    if not found.deterministic:
        return Gradient(None, "fn is random, and autograd's gradient is that of one luck")
    if subject.batched:
        return Gradient(None, 'under `evaluator="batched"` it is not asked')
    leaves = tuple(p.clone().requires_grad_() for p in subject.params)
    args, kwargs = subject.arguments.build(leaves)
    subject.count(1)
    with warnings.catch_warnings(), torch.enable_grad(), TorchStream(subject.space.device) as stream:
        warnings.simplefilter("ignore")
        stream.seed(seed)
        try:
            out = as_tensor(plain_call(subject, args, kwargs), subject.name)
            if not out.requires_grad:
                return Gradient(None, "its value has no graph back to the arguments")
            grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        except Exception as error:  # of fn or of autograd: it is no differentiable function
            return Gradient(None, f"{type(error).__name__}: {error}")
    flat = subject.space.join(
        tuple(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True))
    )
    if not torch.isfinite(flat).all():
        return Gradient(None, "autograd's gradient is not finite")
    return Gradient(flat.detach()) if flat.any() else Gradient(None, "autograd's gradient is zero")
