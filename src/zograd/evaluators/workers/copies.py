"""A function for one thread: with copies of the modules that it uses, so that threads never share one."""

from __future__ import annotations

import copy
import functools
import types
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.isolation import leaves_traces
from zograd._base.reach import MANY, closure, defaults, named_globals, of_library

if TYPE_CHECKING:
    from collections.abc import Callable

_HOLDERS = (list, tuple, dict)


def private(fn: Callable[..., Any], leaves: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """A function and arguments with modules of their own.

    Modules count where they are arguments, where the function is one or a method of one, and in its closure, its
    defaults, the globals it names and its attributes; also where they stand in lists, tuples and dicts there, and where
    functions found there use them. Everything else is the same object. A function that has a module in its globals sees
    these as they are when its thread begins with an estimate, and keeps to itself what it assigns to them.

    Args:
        fn: the function.
        leaves: its arguments.

    Returns:
        The function and arguments for one thread.
    """
    copies = _Copies()
    return copies.own(fn), [copies.part(x) for x in leaves]


class _Copies:
    """What was copied so far, each once."""

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}
        self._functions: dict[int, types.FunctionType] = {}
        self._scopes: dict[int, dict[str, Any]] = {}  # by the globals that they stand for

    def own(self, value: Any) -> Any:
        """Return a copy of a callable, itself if there is no module in it."""
        if leaves_traces(value):
            return value.for_thread()
        if isinstance(value, functools.partial):
            keywords = {k: self.own(v) for k, v in value.keywords.items()}
            return functools.partial(self.own(value.func), *map(self.own, value.args), **keywords)
        if isinstance(value, types.MethodType):
            owner, method = self.own(value.__self__), self.part(value.__func__)
            same = owner is value.__self__ and method is value.__func__
            return value if same else types.MethodType(method, owner)
        if isinstance(value, (torch.nn.Module, types.FunctionType)):
            return self.part(value)
        return self._with_parts(value)

    def _with_parts(self, value: Any) -> Any:
        held = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, torch.nn.Module)}
        if held and not isinstance(value, type):
            value = copy.copy(value)
            value.__dict__.update({k: self.part(v) for k, v in held.items()})
        return value

    def part(self, value: Any) -> Any:
        """Return a copy of something that a function uses, itself if there is no module in it."""
        if not _uses_module(value):
            return value
        if isinstance(value, torch.nn.Module):
            return copy.deepcopy(value, self._memo)
        if isinstance(value, types.FunctionType):
            return self._functions.get(id(value)) or self._copy_of(value)
        if isinstance(value, dict):
            return {k: self.part(v) for k, v in value.items()}
        return type(value)(map(self.part, value))

    def _copy_of(self, fn: types.FunctionType) -> types.FunctionType:
        old = fn.__closure__ or ()
        held = closure(fn)
        cells = [
            types.CellType() if _uses_module(held.get(name)) else cell
            for name, cell in zip(fn.__code__.co_freevars, old, strict=True)
        ]
        scope = self._scopes.setdefault(id(fn.__globals__), dict(fn.__globals__))
        copied = types.FunctionType(fn.__code__, scope, fn.__name__, None, tuple(cells) or None)
        self._functions[id(fn)] = copied  # before its parts, which may name it
        functools.update_wrapper(copied, fn)
        copied.__defaults__ = tuple(map(self.part, fn.__defaults__)) if fn.__defaults__ else None
        copied.__kwdefaults__ = {k: self.part(v) for k, v in (fn.__kwdefaults__ or {}).items()}
        for mine, theirs in zip(cells, old, strict=True):
            if mine is not theirs:
                mine.cell_contents = self.part(theirs.cell_contents)
        scope.update({name: self.part(value) for name, value in named_globals(fn).items()})
        return copied


def _uses_module(value: Any, seen: set[int] | None = None) -> bool:
    if isinstance(value, torch.nn.Module):
        return True
    if type(value) in _HOLDERS:
        inside = value.values() if type(value) is dict else value
        return len(value) <= MANY and any(isinstance(part, torch.nn.Module) for part in inside)
    seen = set() if seen is None else seen
    if not isinstance(value, types.FunctionType) or id(value) in seen or of_library(value):
        return False
    seen.add(id(value))
    held = (*closure(value).values(), *defaults(value).values(), *named_globals(value).values())
    return any(_uses_module(part, seen) for part in held)
