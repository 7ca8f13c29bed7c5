"""Digests of values: the same bytes for the same value in every process, an error for what has none."""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import pathlib
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.buffers import memory
from zograd._base.reach import is_array, is_generator, is_tuple, of_library, parts, reach

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from zograd._base.reach import Step

_BY_TEXT = (type(None), bool, int, complex, str, range, slice, type(Ellipsis), torch.dtype, torch.device, torch.layout)
_SEQUENCES = (list, tuple, deque, torch.Size)
_DICTS = (dict, OrderedDict, defaultdict)
_LOGS = (list, dict, set, frozenset, deque)
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType)
_STORES = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")
_Stores = tuple[frozenset[str], frozenset[str], frozenset[str]]


class Undigestable(TypeError):
    """A value without a digest; its text names the value."""


class Digest:
    """A hash over values, each with its type and length, so that no two lists of values run together."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._inside: list[int] = []  # containers that are being looked through

    def result(self) -> bytes:
        """128 bits."""
        return self._hash.digest()

    def add(self, value: Any) -> Digest:
        """Take a value.

        Args:
            value: a number, text, tensor, array, module, function, or a container of them.

        Returns:
            This digest.

        Raises:
            Undigestable: if it is something else.
        """
        if type(value) is str:
            self._tag("str", value.encode(errors="surrogatepass"))
        elif type(value) in _BY_TEXT:
            self._tag(_name(type(value)), repr(value).encode())
        elif type(value) is float:
            self._tag("float", value.hex().encode())
        elif isinstance(value, (bytes, bytearray)):
            self._tag("bytes", bytes(value))
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif is_array(value):
            self._array(value)
        elif isinstance(value, torch.nn.Module):
            self.captured(value)
        else:
            self._compound(value)
        return self

    def _tag(self, kind: str, data: bytes) -> None:
        self._hash.update(f"{kind} {len(data)} ".encode())
        self._hash.update(data)

    def _head(self, *words: Any) -> None:
        self._tag("head", " ".join(map(str, words)).encode())

    def _tensor(self, t: torch.Tensor) -> None:
        self._head("tensor", t.dtype, tuple(t.shape), t.layout)
        if hasattr(t, "__tensor_flatten__") or t.is_quantized or t.is_meta or t.is_nested:
            raise Undigestable(f"a {type(t).__name__} without plain values")
        t = t.detach()
        if t.layout != torch.strided:
            parts = {torch.sparse_coo: ("indices", "values")}.get(t.layout, ())
            if not parts:
                raise Undigestable(f"a tensor of layout {t.layout}")
            t = t.coalesce()
            for part in parts:
                self._tensor(getattr(t, part)())
            return
        self._hash.update(memory(t))

    def _array(self, a: Any) -> None:
        if a.dtype.hasobject:
            raise Undigestable("an array of objects")
        self._head(_name(type(a)), a.dtype.descr if a.dtype.names else a.dtype.str, a.shape)
        self._hash.update(a.tobytes())

    def _compound(self, value: Any) -> None:
        if id(value) in self._inside:
            self._head("again", len(self._inside) - self._inside.index(id(value)))
            return
        self._inside.append(id(value))
        kind = type(value)
        self._head(_name(kind))
        if kind in _SEQUENCES or is_tuple(value):
            self._each(value)
        elif kind in _DICTS:
            self._each([x for item in value.items() for x in item])
        elif kind in (set, frozenset):
            self._each(sorted(Digest().add(x).result() for x in value))
        elif isinstance(value, enum.Enum):
            self.add(value.name)
        elif isinstance(value, pathlib.PurePath):
            self.add(str(value))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self._each([x for f in dataclasses.fields(value) for x in (f.name, getattr(value, f.name))])
        elif callable(value):
            self._callable(value)
        else:
            raise Undigestable(f"a {_name(kind)} {value!r:.60}")
        self._inside.pop()

    def _each(self, values: Iterable[Any]) -> None:
        values = list(values)
        self._head(len(values))
        for value in values:
            self.add(value)

    def _callable(self, fn: Any) -> None:
        if isinstance(fn, functools.partial):
            self._each([fn.func, list(fn.args), fn.keywords])
        elif isinstance(fn, types.MethodType):
            self.add(fn.__func__).add(fn.__self__)
        elif isinstance(fn, types.FunctionType):
            self.captured(fn)
        elif isinstance(fn, (type, *_BUILTIN)):
            self._head(fn.__module__, fn.__qualname__)
        else:
            raise Undigestable(f"a {_name(type(fn))} {fn!r:.60}")

    def captured(self, fn: Callable[..., Any]) -> None:
        """Take what a function or module reads that is not an argument, as far as it is plain.

        Numbers, texts, tensors, arrays, functions and modules that it reaches count, by the way that leads there. What
        lists, dicts and sets hold does not, as these may be logs, nor does what the functions themselves assign to. The
        arguments that a partial holds count whatever they are.

        Raises:
            Undigestable: if one of those is something that has no digest.
        """
        if isinstance(fn, functools.partial):
            self.add(list(fn.args)).add(fn.keywords)  # arguments like those of a call, and no logs
            self.captured(fn.func)
            return
        read = _Read(fn)
        numbers, stack = {id(fn): 0}, [fn]  # what is held in two places counts as such
        while stack:
            thing = stack.pop()
            self._itself(thing)
            for step, part in read.inputs(thing):
                self._head(step.kind, step.text)
                if _is_plain(part):
                    self.add(part)
                    continue
                if id(part) not in numbers:
                    numbers[id(part)] = len(numbers)
                    stack.append(part)
                self._head("number", numbers[id(part)])
            self._head("end")

    def _itself(self, thing: Any) -> None:
        self._head(_name(type(thing)))
        if isinstance(thing, types.FunctionType):
            self.add(code_of(thing))
        elif isinstance(thing, torch.nn.Module):
            self._head(thing.training)
        elif isinstance(thing, (type, *_BUILTIN)):
            self._head(getattr(thing, "__module__", ""), thing.__qualname__)


class _Read:
    """What a function reads: all that it reaches, but logs and what it stores itself.

    Args:
        fn: the function.
    """

    def __init__(self, fn: Any) -> None:
        self._things = {id(here.value): here.value for here in reach(fn)}
        self._globals: set[tuple[int, str]] = set()  # that a function stores, by the module's names
        self._cells: set[int] = set()
        self._attributes: set[str] = set()  # of any object, by functions that are no methods
        functions = [x for x in self._things.values() if isinstance(x, types.FunctionType) and not of_library(x)]
        methods = {id(m) for x in self._things.values() for step, m in parts(x) if step.kind == "method"}
        for f in functions:
            its_globals, variables, attributes = _assigned(f.__code__)
            cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
            self._globals.update((id(f.__globals__), name) for name in its_globals)
            self._cells.update(id(cell) for name, cell in cells if name in variables)
            if id(f) not in methods:
                self._attributes |= attributes

    def inputs(self, thing: Any) -> Iterator[tuple[Step, Any]]:
        """Yield what a thing holds that counts."""
        held = [(step, part) for step, part in parts(thing) if id(part) in self._things]
        stored = self._attributes.union(*(_stored(x) for step, x in held if step.kind == "method"))
        if not isinstance(thing, torch.nn.Module) and of_library(type(thing)):  # tools that count and time themselves
            stored = stored.union(*map(_stored, _methods(type(thing))))
        for step, part in held:
            name = step.text.removeprefix(".")
            if isinstance(part, _LOGS) or is_generator(part):
                continue
            if step.kind == "attribute" and (name in stored or name.startswith("zero_order_")):
                continue
            if step.kind == "global" and (id(thing.__globals__), name) in self._globals:
                continue
            if step.kind == "closure" and id(_cell(thing, name)) in self._cells:
                continue
            yield step, part


def _methods(kind: type) -> list[Any]:
    return [x for owner in kind.__mro__ for name, x in vars(owner).items() if name != "__init__" and callable(x)]


def _cell(fn: types.FunctionType, name: str) -> types.CellType:
    assert fn.__closure__ is not None
    return fn.__closure__[fn.__code__.co_freevars.index(name)]


def _is_plain(value: Any) -> bool:
    """Whether it is data that has a digest of its own."""
    return isinstance(
        value, (*_BY_TEXT, float, bytes, bytearray, torch.Tensor, torch.Size, enum.Enum, pathlib.PurePath)
    ) or is_array(value)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def code_of(fn: Any) -> str:
    """A digest of what a function does: of its bytecode, which comments and line numbers do not change.

    Args:
        fn: a function, method, partial or callable object.

    Returns:
        Hexadecimal digits; none for what has no bytecode.
    """
    if isinstance(fn, functools.partial):
        return code_of(fn.func)
    fn = inspect.unwrap(getattr(fn, "__func__", fn))
    if not isinstance(fn, types.FunctionType):
        fn = type(fn).__call__
    return _code(fn.__code__) if isinstance(fn, types.FunctionType) else ""


@functools.lru_cache(maxsize=1024)
def _code(code: types.CodeType) -> str:
    digest = Digest().add(code.co_code)
    digest.add([_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts])
    return digest.add([list(code.co_names), list(code.co_varnames), list(code.co_freevars)]).result().hex()


def _stored(fn: Any) -> frozenset[str]:
    """The attributes that a method assigns to: what it counts or keeps there is no input."""
    fn = inspect.unwrap(getattr(fn, "__func__", fn))
    return _assigned(fn.__code__)[2] if isinstance(fn, types.FunctionType) else frozenset()


@functools.lru_cache(maxsize=1024)
def _assigned(code: types.CodeType) -> _Stores:
    """The names of globals, closed-over variables and attributes that a code assigns to."""
    inner = [_assigned(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    own = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    found = [frozenset(name for op, name in own if op == store) for store in _STORES]
    globals_, variables, attributes = (names.union(*(c[k] for c in inner)) for k, names in enumerate(found))
    return globals_, variables, attributes
