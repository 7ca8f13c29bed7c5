"""Checks of arguments: one rule for each kind of value, and one form for each message.

``typed`` is the call as the user wrote it, in backticks, such as "`Pool(workers=...)`": the subject of the message.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch


class Range(NamedTuple):
    """A set of numbers, and the words for it that follow "must"."""

    text: str
    holds: Callable[[float], bool]


POSITIVE = Range("be positive", lambda x: x > 0)
FINITE = Range("be finite", math.isfinite)
POSITIVE_FINITE = Range("be positive and finite", lambda x: 0 < x < math.inf)
NOT_NEGATIVE_FINITE = Range("be at least 0 and finite", lambda x: 0 <= x < math.inf)
UNIT = Range("lie in [0, 1]", lambda x: 0 <= x <= 1)
FRACTION = Range("lie above 0 and be at most 1", lambda x: 0 < x <= 1)


@overload
def integer(
    value: Any, typed: str, *, least: int | None = None, none: Literal[False] = False, kind: str = "an int"
) -> int: ...
@overload
def integer(
    value: Any, typed: str, *, least: int | None = None, none: Literal[True], kind: str = "an int"
) -> int | None: ...
def integer(
    value: Any, typed: str, *, least: int | None = None, none: bool = False, kind: str = "an int"
) -> int | None:
    """Return a value as an int.

    Args:
        value: an int, or what Python takes for one, such as a number of numpy; no bool and no tensor.
        typed: the subject of the message.
        least: the least value allowed.
        none: whether None is allowed.
        kind: how the message calls an int.

    Raises:
        TypeError: if it is not an int.
        ValueError: if it is below ``least``.
    """
    if value is None and none:
        return None
    try:
        if isinstance(value, (bool, torch.Tensor)):
            raise TypeError
        given = operator.index(value)
    except TypeError:
        raise TypeError(_wanted(value, typed, kind, none=none)) from None
    if least is not None and given < least:
        raise ValueError(f"{typed} must be at least {least}, got {given}.")
    return given


def seed(value: Any, typed: str, *, kind: str = "an int") -> int:
    """Return a value as a seed, an int of 63 bits."""
    given = integer(value, typed, kind=kind)
    if not 0 <= given < 1 << 63:
        raise ValueError(f"{typed} must lie in [0, 2**63), got {given}.")
    return given


@overload
def number(value: Any, typed: str, *ranges: Range, none: Literal[False] = False, kind: str = "a number") -> float: ...
@overload
def number(value: Any, typed: str, *ranges: Range, none: Literal[True], kind: str = "a number") -> float | None: ...
def number(value: Any, typed: str, *ranges: Range, none: bool = False, kind: str = "a number") -> float | None:
    """Return a value as a number of Python, an int as it is.

    Args:
        value: a real number, or a tensor or array of one; no bool and no text.
        typed: the subject of the message.
        *ranges: where it must lie; the first in which it does not is named.
        none: whether None is allowed.
        kind: how the message calls a number.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is outside a range.
    """
    if value is None and none:
        return None
    try:
        given = value.item() if hasattr(value, "item") else value
        if isinstance(given, (bool, str, bytes, bytearray)):
            raise TypeError
        real = float(given)
    except OverflowError:
        real = math.inf if given > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(_wanted(value, typed, kind, none=none)) from None
    for wanted in ranges:
        if not wanted.holds(real):
            raise ValueError(f"{typed} must {wanted.text}, got {given!r:.80}.")
    return given if isinstance(given, (int, float)) else real


def instance(value: Any, classes: type | tuple[type, ...], typed: str, kind: str) -> None:
    """Raise TypeError if a value is of none of these classes."""
    if not isinstance(value, classes):
        raise TypeError(_wanted(value, typed, kind))


def boolean(value: Any, typed: str, *, none: bool = False) -> None:
    """Raise TypeError if a value is not a bool."""
    if not (isinstance(value, bool) or (value is None and none)):
        raise TypeError(_wanted(value, typed, "a bool", none=none))


def function(value: Any, typed: str, *, none: bool = False, kind: str = "a function") -> None:
    """Raise TypeError if a value cannot be called."""
    if not (callable(value) or (value is None and none)):
        raise TypeError(_wanted(value, typed, kind, none=none))


def _wanted(value: Any, typed: str, kind: str, *, none: bool = False) -> str:
    wanted = f"{kind} or None" if none else kind
    return f"{typed} must be {wanted}, got {type(value).__name__} {value!r:.80}."
