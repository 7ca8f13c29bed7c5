"""Plain calls of a function: its value, what it draws from and changes, its time."""

from __future__ import annotations

import math
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

_CALLS = 4  # as they come


@dataclass(frozen=True)
class Calls:
    """Properties that plain calls at the parameters show.

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


def plain_calls(subject: Subject) -> Calls:
    """Call the function some times in the same place, with and without one random state, and see what it changes."""
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
    """Return the arguments that are not differentiated, by name."""
    chosen = set(subject.arguments.form.argnums)
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    return {f"argument {i}": x for i, x in named.items() if i not in chosen}


def _was_written_to(leaf: torch.Tensor) -> bool:
    return writes(leaf) > 0 and not leaf.requires_grad


def _timed(subject: Subject, point: Leaves | None) -> tuple[float, float]:
    start = time.perf_counter()
    value = subject.value(point)
    return value, time.perf_counter() - start
