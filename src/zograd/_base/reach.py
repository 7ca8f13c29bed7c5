"""What a function or a module can reach: the one walk that copies, digests, checks and warnings ask.

From a function it goes on to what that closes over, to its defaults, its attributes and the globals that it names, in
code inside it, too; from an object to its attributes, slots and class attributes; from a container to its entries. Each
thing has a path, as its author would write it: ``agent.net.weight``. What to do about it is for who asks.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import os
import random
import sys
import sysconfig
import types
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
"""The containers that are what they hold, and nothing else."""

MANY = 1000
"""Entries of a container beyond which it is data, and not looked through."""

_VARIABLES = ("closure", "global", "default", "partial", "self")
_ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type(Ellipsis))
_TOOLS = {"asyncio", "concurrent", "io", "_io", "logging", "multiprocessing", "queue", "socket", "_thread", "threading"}
"""Modules of objects that lead to the whole program and hold none of its numbers."""
OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has, torch's own."""

_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.Size, torch.Generator)


@dataclass(frozen=True)
class Step:
    """How one thing is reached from another.

    Attributes:
        kind: ``"closure"``, ``"global"``, ``"default"``, ``"partial"``, ``"self"``, ``"function"``, ``"method"``,
            ``"attribute"``, ``"hook"`` or ``"entry"``.
        text: a name, or what is written behind that of the other: ``.net``, ``[0]``.
    """

    kind: str
    text: str

    def behind(self, path: str) -> str:
        """Return the path of the thing, from that of the other."""
        if self.kind in _VARIABLES and self.kind != "partial":
            return self.text
        return path + self.text


@dataclass(frozen=True)
class Reached:
    """A thing that can be reached, by the first way there.

    Attributes:
        path: as its author would write it.
        value: the thing.
        first: the step from the function that was asked about, or from another that it uses.
        hooked: whether a hook of a module leads there.
    """

    path: str
    value: Any
    first: Step | None
    hooked: bool = False


def reach(value: Any, name: str | None = None, *, held: bool = False) -> Iterator[Reached]:
    """Walk from a function, a module or another thing to all that it can reach, each thing once.

    Of an object's methods those are looked into that are called with the object itself, or that code reached so far
    names.

    Args:
        value: where to begin.
        name: what it is called; by default a function by its name, an object ``self``.
        held: whether to stop at functions, whose variables are their author's, but for the hooks of modules.

    Yields:
        The thing itself, and what it reaches, what is held before what that holds.
    """
    seen: set[int] = set()
    kept: list[Any] = []  # so that no two things of the walk have one id
    known = {"__call__", "forward"}  # names in the code that was reached
    unknown: dict[str, list[Reached]] = {}  # methods by names that none of it has
    stack = [Reached(name or (value.__name__ if isinstance(value, types.FunctionType) else "self"), value, None)]
    while stack:
        here = stack.pop()
        if type(here.value) not in _ATOMS:
            if id(here.value) in seen:
                continue
            seen.add(id(here.value))
            kept.append(here.value)
        yield here
        inner = []
        if held and is_of_author(here):
            continue
        for step, part in parts(here.value):
            first = step if step.kind in _VARIABLES else here.first
            found = Reached(step.behind(here.path), part, first, here.hooked or step.kind == "hook")
            if step.kind != "method" or step.text[1:] in known:
                inner.append(found)
            else:
                unknown.setdefault(step.text[1:], []).append(found)
        if isinstance(here.value, types.FunctionType) and not of_library(here.value):
            for word in _names(here.value.__code__):
                known.add(word)
                inner.extend(unknown.pop(word, ()))
        stack.extend(reversed(inner))


def is_of_author(here: Reached) -> bool:
    """Return whether a thing is a function whose variables are its author's own: none that hooks lead to."""
    return isinstance(here.value, types.FunctionType) and not here.hooked


def parts(value: Any) -> Iterator[tuple[Step, Any]]:
    """Yield what a thing holds itself, with the step there."""
    kind = type(value)
    if kind in _ATOMS or isinstance(value, (torch.Tensor, types.ModuleType, *_OF_TORCH)) or is_array(value):
        return
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield Step("self", "self"), value.__self__
        yield Step("function", ""), value.__func__
    elif isinstance(value, functools.partial):
        yield Step("function", ".func"), value.func
        yield from ((Step("partial", f".args[{i}]"), x) for i, x in enumerate(value.args))
        yield from ((Step("partial", f".keywords[{k!r}]"), x) for k, x in value.keywords.items())
    elif isinstance(value, (staticmethod, classmethod)):
        yield Step("function", ".__func__"), value.__func__
    elif isinstance(value, property):
        yield Step("function", ".fget"), value.fget
    elif isinstance(value, nn.Module):
        yield from _of_module(value)
    elif isinstance(value, type):
        yield from _of_class(value)
    elif isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        yield from _of_container(value)
    else:
        yield from _of_object(value)


def attributes(value: Any) -> dict[str, Any]:
    """Return an object's own attributes by name, those in slots included."""
    found = dict(getattr(value, "__dict__", {}))
    for slot in slots(type(value)):
        with contextlib.suppress(AttributeError):  # an empty one
            found[slot.__name__] = slot.__get__(value)
    return found


def slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """Return the slots of a class and those above it."""
    held = (x for owner in kind.__mro__ if "__slots__" in vars(owner) for x in vars(owner).values())
    return tuple(x for x in held if isinstance(x, types.MemberDescriptorType))


def closure(fn: types.FunctionType) -> dict[str, Any]:
    """Return what a function closes over, by name."""
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}


def named_globals(fn: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a function names, itself or in what is defined inside it."""
    return {name: fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__}


def defaults(fn: types.FunctionType) -> dict[str, Any]:
    """Return the defaults of a function's arguments, by name."""
    code, values = fn.__code__, fn.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(names, values, strict=True)), **(fn.__kwdefaults__ or {})}


def of_library(thing: Any) -> bool:
    """Return whether a function or a class comes with Python or an installed package, and so is not the user's."""
    if isinstance(thing, types.FunctionType):
        return _is_library_file(thing.__code__.co_filename)
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    return module is not None and (file := getattr(module, "__file__", None) or "") != "" and _is_library_file(file)


def is_tuple(value: Any) -> bool:
    """Return whether a value is a tuple, with names or without, that is what it holds and nothing else."""
    return type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields"))


def is_array(value: Any) -> bool:
    """Return whether a value is an array or a number of numpy, which need not be there."""
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tobytes")


def is_generator(value: Any) -> bool:
    """Return whether a value is a source of random numbers: torch's, Python's or numpy's."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState, numpy.BitGenerator))


def is_tool(value: Any) -> bool:
    """Return whether a value leads to the whole program and holds none of its numbers, or is this package's own."""
    return type(value).__module__.partition(".")[0] in {"zograd", *_TOOLS}


def _of_function(fn: types.FunctionType) -> Iterator[tuple[Step, Any]]:
    library = of_library(fn)
    if library and of_library(inspect.unwrap(fn)):
        return
    yield from ((Step("closure", name), x) for name, x in closure(fn).items())
    yield from ((Step("default", name), x) for name, x in defaults(fn).items())
    for name, x in () if library else named_globals(fn).items():  # a library's decorator reads only the library's
        if isinstance(x, types.ModuleType):
            yield from _of_python_module(name, x, fn)
        else:
            yield Step("global", name), x
    yield from ((Step("attribute", f".{name}"), x) for name, x in vars(fn).items())


def _of_python_module(name: str, module: types.ModuleType, fn: types.FunctionType) -> Iterator[tuple[Step, Any]]:
    """Yield what a function may read of a module of the user's that it names."""
    if not _is_library_file(getattr(module, "__file__", None) or ""):
        for attribute in _names(fn.__code__):
            if attribute in vars(module):
                yield Step("global", f"{name}.{attribute}"), vars(module)[attribute]


def _of_module(module: nn.Module) -> Iterator[tuple[Step, Any]]:
    for held in (module.named_parameters(recurse=False), module.named_buffers(recurse=False), module.named_children()):
        yield from ((Step("attribute", _attribute(name)), x) for name, x in held)
    for name, x in attributes(module).items():
        if (name not in OF_MODULES or name == "training") and not name.startswith("_zero_order"):
            yield Step("attribute", _attribute(name)), x
        elif isinstance(x, OrderedDict):  # hooks
            yield from ((Step("hook", f".{name}[{i}]"), hook) for i, hook in enumerate(x.values()))
    yield from _of_class(type(module))


def _of_object(value: Any) -> Iterator[tuple[Step, Any]]:
    if "__wrapped__" in getattr(value, "__dict__", {}) and of_library(type(value)):
        yield Step("function", ""), value.__wrapped__  # a cache, or one of our own decorators
        return
    if is_tool(value):
        return
    yield from _of_attributes(attributes(value))
    if not isinstance(value, types.BuiltinFunctionType):
        yield from _of_class(type(value))


def _of_class(kind: type) -> Iterator[tuple[Step, Any]]:
    """Yield a class's own and inherited attributes, and the functions that are its methods."""
    taken: set[str] = set()
    for owner in kind.__mro__:
        if owner.__module__ == "builtins" or of_library(owner):
            continue
        for name, x in vars(owner).items():
            if name in taken or (name.startswith("__") and name.endswith("__") and name != "__call__"):
                continue
            taken.add(name)
            if isinstance(x, (types.FunctionType, staticmethod, classmethod, property)):
                yield Step("method", f".{name}"), x
            elif not isinstance(x, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                yield Step("attribute", f".{name}"), x


def _of_attributes(held: dict[str, Any]) -> Iterator[tuple[Step, Any]]:
    for name, x in list(held.items()):
        yield Step("attribute", _attribute(name)), x


def _of_container(value: Any) -> Iterator[tuple[Step, Any]]:
    if len(value) > MANY:
        return
    if isinstance(value, dict):
        for k, x in list(value.items()):
            yield Step("entry", f"[{k!r}]"), x
            if type(k) not in _ATOMS:
                yield Step("entry", f".keys(){{{k!r:.20}}}"), k
    elif is_tuple(value) and type(value) is not tuple:
        for name, x in zip(value._fields, value, strict=True):
            yield Step("attribute", f".{name}"), x
    elif isinstance(value, (set, frozenset)):
        for x in list(value):
            yield Step("entry", f"{{{x!r:.20}}}"), x
    else:
        for i, x in enumerate(list(value)):
            yield Step("entry", f"[{i}]"), x
    if type(value).__module__ not in ("builtins", "collections"):  # a class of the user's has attributes, too
        yield from _of_object(value)


def _attribute(name: str) -> str:
    return f".{name}" if name.isidentifier() else f"[{name}]" if name.isdecimal() else f"[{name!r}]"


@functools.lru_cache(maxsize=1024)
def stored_globals(code: types.CodeType) -> tuple[str, ...]:
    """Return the globals that code assigns to, itself or in what is defined inside it."""
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in stored_globals(c)]
    own = [i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")]
    return tuple(dict.fromkeys([*own, *inner]))


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


@functools.lru_cache(maxsize=1024)
def _is_library_file(file: str) -> bool:
    if not file or file.startswith("<"):
        return file.startswith("<frozen")
    path = os.path.abspath(file)
    if any(part in ("site-packages", "dist-packages") for part in path.split(os.sep)):
        return True
    paths = sysconfig.get_paths()
    homes = [paths["stdlib"], paths["platstdlib"], os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    return any(path.startswith(os.path.abspath(home) + os.sep) for home in homes)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True
