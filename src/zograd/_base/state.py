"""State: what a module and all that it reaches held at one moment, to be put back in place.

A thing that can change is a cell: a container, the attributes of an object or a class, the variables of a function,
the memory of a tensor or an array, a generator. A :class:`State` is what each cell held; :meth:`State.put_back` lets it
hold that again, in the same object, whoever else has it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import random
import types
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from zograd._base.reach import (
    OF_MODULES,
    is_array,
    is_generator,
    is_of_author,
    is_tool,
    of_library,
    reach,
    slots,
    stored_globals,
)
from zograd._base.torch_private import REGISTRIES, storages

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from zograd._base.reach import Reached

LIMIT = 1 << 26
"""Bytes of what is neither a buffer nor a parameter that are kept and put back; what is beyond is compared."""

_ITERATORS: tuple[type[Any], ...] = (
    itertools.count,
    itertools.cycle,
    itertools.chain,
    type(iter([])),
    type(iter(())),
    type(iter(range(0))),
)


class Place(NamedTuple):
    """Where a tensor is held.

    Attributes:
        tensor: the tensor.
        put: puts another one there.
        cell: what holds it.
    """

    tensor: torch.Tensor
    put: Callable[[Any], None]
    cell: Any


class Things:
    """All that a module reaches, found by one walk.

    Args:
        root: the module.
        held: whether to leave out what functions other than hooks read beside their arguments.
    """

    def __init__(self, root: Any, *, held: bool = True) -> None:
        self.reached: list[Reached] = list(reach(root, held=held))
        self.cells: list[tuple[str, Any]] = []
        seen: set[int] = set()
        for here in self.reached:
            if held and is_of_author(here):
                continue
            for path, cell in _cells(here.path, here.value):
                if id(cell) not in seen:
                    seen.add(id(cell))
                    self.cells.append((path, cell))

    def add(self, others: Things) -> None:
        """Add what was found by another walk and not by this one."""
        cells, reached = {id(cell) for _, cell in self.cells}, {id(here.value) for here in self.reached}
        self.cells += [(path, cell) for path, cell in others.cells if id(cell) not in cells]
        self.reached += [here for here in others.reached if id(here.value) not in reached]

    def held(self) -> Iterator[Any]:
        """Yield what the cells hold, and what tuples there hold."""
        stack = [value for _, cell in self.cells for _, value in _entries(cell)]
        while stack:
            value = stack.pop()
            yield value
            if isinstance(value, tuple):
                stack.extend(value)

    def places(self, ids: Collection[int]) -> Iterator[Place]:
        """Yield where tensors are held.

        Args:
            ids: of the tensors.

        Yields:
            Their places.

        Raises:
            TypeError: if one is held where no other can be put.
        """
        for _, cell in self.cells:
            for key, value in _entries(cell):
                if id(value) in ids:
                    yield Place(value, _put(cell, key), cell)
                elif isinstance(value, tuple) and _holds(value, ids):
                    for tensor, rebuilt in _inside(value, ids):
                        yield Place(tensor, _Rebuilding(cell, key, rebuilt).put, cell)


class State:
    """What the cells of some things held at one moment.

    Args:
        things: the things.
        apart: ids of tensors that are not kept here.
        last: whether nothing is put back before it: then iterators themselves are kept, and copies of them otherwise.
    """

    def __init__(self, things: Things, apart: Collection[int] = (), *, last: bool = False) -> None:
        self._backs: list[Callable[[], None]] = []
        self.generators: list[tuple[Any, bytes]] = []
        self.large: list[tuple[str, Any]] = []  # tensors and arrays that are compared, with their paths
        self.storages: dict[int, _Copy] = {}  # by the address of their memory
        self.tensors: list[torch.Tensor] = []  # those that are put back
        self._left = LIMIT
        buffers = {id(b) for here in things.reached if isinstance(here.value, nn.Module) for b in _buffers(here.value)}
        self._backs.extend(_back(cell, last=last) for _, cell in things.cells)
        self.of_classes: dict[tuple[type, str], Any] = {
            (cell.owner, name): x
            for _, cell in things.cells
            if isinstance(cell, _Attributes) and isinstance(cell.owner, type)
            for name, x in cell.items()
        }
        for here in things.reached:
            value = here.value
            if isinstance(value, torch.Tensor):
                if id(value) not in apart:
                    self._keep_tensor(here.path, value, always=isinstance(value, nn.Parameter) or id(value) in buffers)
            elif is_array(value):
                if hasattr(value, "flags") and value.flags.writeable and value.ndim:
                    self._keep_array(here.path, value)
            elif is_generator(value):
                self._keep_generator(value)

    def put_back(self) -> None:
        """Let every cell hold what it held."""
        for back in self._backs:
            back()

    def _keep_tensor(self, path: str, tensor: torch.Tensor, *, always: bool) -> None:
        views = storages(tensor)
        if views is None:
            self.large.append((path, tensor))
            return
        size = sum(view.numel() for view in views)
        if not always and size > self._left:
            self.large.append((path, tensor))
            return
        self._left -= 0 if always else size
        self._backs.append(_back_to_memory(tensor))
        self.tensors.append(tensor)
        for view in views:
            if view.numel() and view.data_ptr() not in self.storages:
                copied = self.storages[view.data_ptr()] = _Copy(view, view.clone())
                self._backs.append(copied.back)

    def _keep_array(self, path: str, array: Any) -> None:
        if array.nbytes > self._left:
            self.large.append((path, array))
            return
        self._left -= array.nbytes
        kept = array.copy()

        def back() -> None:
            array[...] = kept

        self._backs.append(back)

    def _keep_generator(self, generator: Any) -> None:
        if isinstance(generator, torch.Generator):
            state = generator.get_state()
            self._backs.append(functools.partial(_set_state, generator, state))
            self.generators.append((generator, bytes(state.tolist())))
        elif isinstance(generator, random.Random):
            words = generator.getstate()
            self._backs.append(lambda: generator.setstate(words))
            self.generators.append((generator, repr(words).encode()))
        else:
            bits = bit_generator(generator)
            held = copy.deepcopy(bits.state)

            def back() -> None:
                bits.state = held

            self._backs.append(back)
            self.generators.append((generator, repr(held).encode()))


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)


class _Copy(NamedTuple):
    view: torch.Tensor
    kept: torch.Tensor

    def back(self) -> None:
        self.view.copy_(self.kept)

    def equal(self, other: _Copy) -> bool:
        """Return whether the same was kept."""
        return torch.equal(self.kept, other.kept)


class _Rebuilding(NamedTuple):
    cell: Any
    key: Any
    rebuilt: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]

    def put(self, value: Any) -> None:
        now = next(held for key, held in _entries(self.cell) if key == self.key)
        _put(self.cell, self.key)(self.rebuilt(now, value))


# ------------------------------------------------------------------------------------------------------------- cells


class _Attributes:
    """Attributes that are no entries of a dict: slots, and those of classes."""

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names

    def items(self) -> list[tuple[str, Any]]:
        if isinstance(self.owner, type):
            return [(k, x) for k, x in vars(self.owner).items() if _is_plain(k, x)]
        return [(name, getattr(self.owner, name)) for name in self.names if hasattr(self.owner, name)]

    def back(self) -> Callable[[], None]:
        kept = dict(self.items())

        def back() -> None:
            now = dict(self.items())
            if now.keys() == kept.keys() and all(map(operator.is_, now.values(), kept.values())):
                return
            for name in now.keys() - kept.keys():
                delattr(self.owner, name)
            for name, value in kept.items():
                setattr(self.owner, name, value)

        return back


class _Globals:
    """The globals that a function assigns to."""

    def __init__(self, scope: dict[str, Any], names: tuple[str, ...]) -> None:
        self.scope, self.names = scope, names

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self.scope[name]) for name in self.names if name in self.scope]

    def back(self) -> Callable[[], None]:
        kept = dict(self.items())

        def back() -> None:
            for name in self.names:
                if name in kept:
                    self.scope[name] = kept[name]
                else:
                    self.scope.pop(name, None)

        return back


class _Partial:
    """The arguments that a partial holds."""

    def __init__(self, partial: functools.partial[Any]) -> None:
        self.partial = partial

    def put(self, args: tuple[Any, ...]) -> None:
        p = self.partial
        p.__setstate__((p.func, args, p.keywords, vars(p)))  # type: ignore[attr-defined]

    def back(self) -> Callable[[], None]:
        kept = self.partial.args

        def back() -> None:
            if self.partial.args is not kept:
                self.put(kept)

        return back


def bit_generator(generator: Any) -> Any:
    """Return the source of a random generator of numpy's, whose state is a dict."""
    return getattr(generator, "bit_generator", getattr(generator, "_bit_generator", generator))


def can_change(value: Any) -> bool:
    """Return whether a value can be another while it is the same object."""
    if isinstance(value, (torch.Tensor, nn.Module, list, dict, set, deque, bytearray)) or is_generator(value):
        return True
    fixed = (tuple, types.MethodType, types.BuiltinFunctionType, functools.partial)
    return hasattr(value, "flags" if is_array(value) else "__dict__") and not isinstance(value, fixed)


def _is_plain(name: str, value: Any) -> bool:
    if name.startswith("__"):
        return False
    kinds = (types.FunctionType, staticmethod, classmethod, property, types.MemberDescriptorType)
    return not isinstance(value, (*kinds, types.GetSetDescriptorType, type))


def _cells(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the cells of a thing itself."""
    if isinstance(value, (torch.Tensor, types.ModuleType, type)) or is_array(value) or is_generator(value):
        return
    if isinstance(value, types.FunctionType):
        yield from _cells_of_function(path, value)
        return
    if is_tool(value) and not isinstance(value, nn.Module):
        return
    if isinstance(value, functools.partial):
        yield path, value.keywords
        yield path, _Partial(value)
    if isinstance(value, (dict, list, set, deque, bytearray)):
        yield path, value
    if isinstance(value, nn.Module):
        for name, held in vars(value).items():
            if type(held) in (dict, OrderedDict) and name in OF_MODULES:
                yield path if name in REGISTRIES else f"{path}.{name}", held
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        yield path, attributes
    if names := tuple([slot.__name__ for slot in slots(type(value))]):
        yield path, _Attributes(value, names)
    for kind in type(value).__mro__:
        if kind.__module__ != "builtins" and not of_library(kind):
            yield path, _CLASSES.setdefault(kind, _Attributes(kind, ()))


_CLASSES: dict[type, _Attributes] = {}


def _cells_of_function(path: str, fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if of_library(fn):
        return
    yield from ((name, cell) for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    yield path, vars(fn)
    if fn.__defaults__:
        yield path, _Attributes(fn, ("__defaults__",))
    if fn.__kwdefaults__:
        yield path, fn.__kwdefaults__
    names = stored_globals(fn.__code__)
    if names:
        yield "", _Globals(fn.__globals__, names)


def _entries(cell: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(cell, (dict, _Attributes, _Globals)):
        return list(cell.items())
    if isinstance(cell, (list, deque)):
        return list(enumerate(cell))
    if isinstance(cell, _Partial):
        return [("args", cell.partial.args)]
    if isinstance(cell, types.CellType):
        try:
            return [("cell_contents", cell.cell_contents)]
        except ValueError:
            return []
    return []


def _put(cell: Any, key: Any) -> Callable[[Any], None]:
    if isinstance(cell, _Attributes):
        return lambda value: setattr(cell.owner, key, value)
    if isinstance(cell, _Partial):
        return cell.put
    if isinstance(cell, _Globals):
        return lambda value: cell.scope.__setitem__(key, value)
    if isinstance(cell, types.CellType):
        return lambda value: setattr(cell, "cell_contents", value)
    if isinstance(cell, dict):
        return lambda value: _kind(cell).__setitem__(cell, key, value)
    return lambda value: cell.__setitem__(key, value)


def _kind(cell: Any) -> Any:
    """Return the class whose methods change a container, past those of the user's own."""
    return next(k for k in (OrderedDict, dict, list, deque, set, bytearray) if isinstance(cell, k))


def _back(cell: Any, *, last: bool) -> Callable[[], None]:
    if isinstance(cell, (_Attributes, _Globals, _Partial)):
        return cell.back()
    if isinstance(cell, types.CellType):
        return _back_to_variable(cell)
    if isinstance(cell, dict):
        return _back_to_dict(cell, last=last)
    kind = _kind(cell)
    kept = list(cell)
    fill = kind.update if kind is set else kind.extend

    def back() -> None:
        if len(cell) != len(kept) or not all(map(operator.is_, cell, kept)):
            kind.clear(cell)
            fill(cell, kept)

    return back


def _back_to_dict(cell: dict[Any, Any], *, last: bool) -> Callable[[], None]:
    kind, kept = _kind(cell), dict(cell)
    counting = {} if last else {key: copy.copy(x) for key, x in kept.items() if type(x) in _ITERATORS}

    def back() -> None:
        if (
            len(cell) != len(kept)
            or not all(map(operator.is_, cell.values(), kept.values()))
            or cell.keys() != kept.keys()
        ):
            kind.clear(cell)
            kind.update(cell, kept)
        for key, iterator in counting.items():
            cell[key] = copy.copy(iterator)

    return back


def _back_to_variable(cell: types.CellType) -> Callable[[], None]:
    held = _entries(cell)

    def back() -> None:
        for _, value in held:
            cell.cell_contents = value

    return back


def _back_to_memory(tensor: torch.Tensor) -> Callable[[], None]:
    """Return what undoes `tensor.data = ...`."""
    alias = tensor.detach()
    start = alias.data_ptr() if alias.layout == torch.strided else None
    shape = None if alias.is_nested else alias.shape

    def back() -> None:
        if start is not None and (tensor.data_ptr() != start or (shape and tensor.shape != shape)):
            tensor.data = alias

    return back


def _buffers(module: nn.Module) -> list[torch.Tensor]:
    return [b for b in module.buffers(recurse=False) if b is not None]


def _holds(value: tuple[Any, ...], ids: Collection[int]) -> bool:
    return any(id(x) in ids or (isinstance(x, tuple) and _holds(x, ids)) for x in value)


def _inside(
    value: tuple[Any, ...], ids: Collection[int]
) -> Iterator[tuple[torch.Tensor, Callable[[tuple[Any, ...], Any], tuple[Any, ...]]]]:
    """Yield the tensors that a tuple holds, and what makes one with another in its place."""
    for i, x in enumerate(value):
        if id(x) in ids:
            yield x, functools.partial(_with, i)
        elif isinstance(x, tuple):
            for tensor, rebuilt in _inside(x, ids):
                yield tensor, functools.partial(_with_inner, i, rebuilt)


def _with_inner(i: int, rebuilt: Any, value: tuple[Any, ...], new: Any) -> tuple[Any, ...]:
    return _with(i, value, rebuilt(value[i], new))


def _with(i: int, value: tuple[Any, ...], new: Any) -> tuple[Any, ...]:
    parts = [*value[:i], new, *value[i + 1 :]]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
