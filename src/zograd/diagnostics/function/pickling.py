"""The way of a function through ``pickle`` and back."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from zograd.diagnostics.function.subject import Subject


@dataclass(frozen=True)
class Pickling:
    """Result of pickling a function and its arguments, as another process needs it.

    Attributes:
        works: whether it and its arguments pickle, and what comes back has the same value.
        error: why not, or None.
    """

    works: bool
    error: str | None


def pickled(subject: Subject, expected: float | None) -> Pickling:
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
    """Judge a function that pickles as the name of its place, which a new process has to find."""
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
