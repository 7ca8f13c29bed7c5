"""A function for one thread: with copies of the modules that it uses, so that threads never share one."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from typing import TYPE_CHECKING, Any

from torch import nn, optim

from zograd._base.isolation import ModuleFunction
from zograd._base.reach import attributes, closure, named_globals, of_library, parts, reach, slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def private(fn: Callable[..., Any], leaves: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """Return a function and arguments with modules of their own.

    Modules count wherever :func:`~zograd._base.reach.reach` finds them. They are copied with all that they hold, and
    whatever leads to one or to a part of one is made again around the copies: functions, objects, their classes and
    containers. Everything else is the same object. A function that has a module in its globals sees these as they are
    when its thread begins with an estimate, and keeps to itself what it assigns to them.

    Args:
        fn: the function.
        leaves: its arguments.

    Returns:
        The function and arguments for one thread.
    """
    own = fn.for_thread() if isinstance(fn, ModuleFunction) else None
    copies = _Copies(leaves if own is not None else [fn, *leaves])
    return own or copies.of(fn), [copies.of(x) for x in leaves]


def _is_copied(value: Any) -> bool:
    return isinstance(value, (nn.Module, optim.Optimizer))


class _Copies:
    """What a thread has in place of what was reached, each once.

    Args:
        roots: where to begin.
    """

    def __init__(self, roots: list[Any]) -> None:
        every = types.SimpleNamespace(**{f"root{i}": x for i, x in enumerate(roots)})
        things = {id(here.value): here.value for here in reach(every)}
        self._made: dict[int, Any] = {}  # by the id of what it stands for, as deepcopy keeps it
        self._scopes: dict[int, dict[str, Any]] = {}  # by the globals that they stand for
        for thing in filter(_is_copied, things.values()):
            copy.deepcopy(thing, self._made)
        whole = [x for i, x in things.items() if i in self._made]
        self._changed = _leading_to(self._made.keys() & things.keys(), things.values())
        for thing in whole:  # deepcopy shares functions and classes
            held = {k: x for k, x in attributes(thing).items() if id(x) in self._changed and id(x) not in self._made}
            self._set(self._made[id(thing)], held, type(thing))

    def of(self, value: Any) -> Any:
        """Return what a thread has in place of a thing, itself if there is no module behind it."""
        if id(value) not in self._changed:
            return value
        if id(value) not in self._made:
            self._made.setdefault(id(value), self._again(value))
        return self._made[id(value)]

    def _again(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {k: self.of(x) for k, x in value.keywords.items()}
            return functools.partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if isinstance(value, (staticmethod, classmethod)):
            return type(value)(self.of(value.__func__))
        if isinstance(value, property):
            return property(self.of(value.fget), value.fset, value.fdel)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, tuple):
            return tuple.__new__(type(value), map(self.of, value))
        if isinstance(value, frozenset):
            return frozenset(map(self.of, value))
        if isinstance(value, (dict, list, set, deque)):
            return self._container(value)
        if hasattr(value, "cache_parameters"):
            return functools.lru_cache(**value.cache_parameters())(self.of(value.__wrapped__))
        return self._object(value)

    def _function(self, fn: types.FunctionType) -> types.FunctionType:
        held, free = closure(fn), fn.__code__.co_freevars
        # A method's `__class__` is where `super` begins, which a subclass would call the method from once more.
        fresh = {name for name in free if name != "__class__" and id(held.get(name)) in self._changed}
        old = dict(zip(free, fn.__closure__ or (), strict=True))
        cells = {name: types.CellType() if name in fresh else cell for name, cell in old.items()}
        scope = fn.__globals__ if of_library(fn) else self._scopes.setdefault(id(fn.__globals__), {**fn.__globals__})
        copied = types.FunctionType(fn.__code__, scope, fn.__name__, None, tuple(cells.values()) or None)
        self._made[id(fn)] = copied  # before its parts, which may name it
        functools.update_wrapper(copied, fn, updated=())
        copied.__dict__.update({k: self.of(x) for k, x in vars(fn).items()})
        copied.__defaults__ = tuple(map(self.of, fn.__defaults__)) if fn.__defaults__ else None
        copied.__kwdefaults__ = {k: self.of(x) for k, x in (fn.__kwdefaults__ or {}).items()}
        for name in fresh:
            cells[name].cell_contents = self.of(held[name])
        if scope is not fn.__globals__:
            scope.update({name: self._global(x) for name, x in named_globals(fn).items()})
        return copied

    def _global(self, value: Any) -> Any:
        if not isinstance(value, types.ModuleType):
            return self.of(value)
        fresh = {k: self.of(x) for k, x in list(vars(value).items()) if id(x) in self._changed}
        if not fresh:
            return value
        copied = types.ModuleType(value.__name__)
        copied.__dict__.update({**vars(value), **fresh})
        return copied

    def _class(self, kind: type) -> type:
        """Return a subclass that has the methods and attributes which lead to modules."""
        fresh = {step.text[1:]: x for step, x in parts(kind) if id(x) in self._changed}
        if id(kind) not in self._made:
            about = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
            self._made[id(kind)] = type(kind)(kind.__name__, (kind,), about) if fresh else kind
            for name, x in fresh.items():
                setattr(self._made[id(kind)], name, self.of(x))
        made: type = self._made[id(kind)]
        return made

    def _container(self, value: Any) -> Any:
        copied = self._made[id(value)] = copy.copy(value)
        items = [(self.of(k), self.of(x)) for k, x in value.items()] if isinstance(value, dict) else map(self.of, value)
        items = list(items)
        copied.clear()
        (copied.extend if isinstance(value, (list, deque)) else copied.update)(items)
        self._set(copied, attributes(value), type(value))
        return copied

    def _object(self, value: Any) -> Any:
        try:
            copied = object.__new__(type(value))
        except TypeError:  # of a class that is not Python's
            copied = copy.copy(value)
        if copied is not value:
            self._made[id(value)] = copied
            self._set(copied, attributes(value), type(value))
        return copied

    def _set(self, copied: Any, held: dict[str, Any], kind: type) -> None:
        """Give a copy its own of these attributes and of its class."""
        in_slots = {slot.__name__: slot for slot in slots(kind)}
        for name, x in held.items():
            if name in in_slots:
                in_slots[name].__set__(copied, self.of(x))
            else:
                copied.__dict__[name] = self.of(x)
        own = self._class(kind)
        if own is not kind:
            object.__setattr__(copied, "__class__", own)


def _leading_to(goals: Iterable[int], things: Iterable[Any]) -> set[int]:
    """Return the ids of what leads to these, themselves included."""
    holders: dict[int, list[int]] = {}
    for thing in things:
        for _, part in parts(thing):
            holders.setdefault(id(part), []).append(id(thing))
    found, new = set(goals), list(goals)
    while new:
        more = set(holders.get(new.pop(), ())) - found
        found |= more
        new.extend(more)
    return found
