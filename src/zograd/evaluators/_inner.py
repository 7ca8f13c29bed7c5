"""The names of evaluators, and what one that wraps another accepts as that."""

from __future__ import annotations

from zograd.evaluators.base import Evaluator
from zograd.evaluators.batched import Batched
from zograd.evaluators.loop import Loop
from zograd.evaluators.vmap import Vmap

__all__ = ["EVALUATORS", "as_evaluator"]

EVALUATORS: dict[str, type[Loop | Vmap | Batched]] = {"loop": Loop, "vmap": Vmap, "batched": Batched}
"""The names that ``evaluator=`` accepts."""


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
