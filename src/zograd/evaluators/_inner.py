"""What an evaluator that wraps another one accepts as that."""

from __future__ import annotations

from zograd.evaluators.base import Evaluator
from zograd.evaluators.batched import Batched
from zograd.evaluators.loop import Loop
from zograd.evaluators.vmap import Vmap

__all__ = ["as_evaluator"]

_NAMES: dict[str, type[Evaluator]] = {"loop": Loop, "vmap": Vmap, "batched": Batched}


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
    if inner not in _NAMES:
        raise ValueError(f"`{typed}` must be one of {', '.join(map(repr, _NAMES))} or an Evaluator, got {inner!r}.")
    return _NAMES[inner]()
