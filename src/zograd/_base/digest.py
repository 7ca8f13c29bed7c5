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
from zograd._base.reach import closure, is_array, named_globals
from zograd._base.torch_private import registries

if TYPE_CHECKING:
    from collections.abc import Iterable

_BY_TEXT = (type(None), bool, int, complex, str, range, slice, type(Ellipsis), torch.dtype, torch.device, torch.layout)
_SEQUENCES = (list, tuple, deque, torch.Size)
_DICTS = (dict, OrderedDict, defaultdict)
_STORES = ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")


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
            self._module(value)
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

    def _module(self, module: torch.nn.Module) -> None:
        for name, part in module.named_modules():
            self._head("module", name, _name(type(part)), part.training)
            self.add(code_of(type(part).forward))
            for tensors in registries(part)[:2]:
                for key, tensor in tensors.items():
                    self._head(key)
                    self.add(tensor)
            own = {k: v for k, v in vars(part).items() if not k.startswith(("_", "zero_order_"))}
            self._known(own, _stored(type(part).forward))

    def _compound(self, value: Any) -> None:
        if id(value) in self._inside:
            self._head("again", len(self._inside) - self._inside.index(id(value)))
            return
        self._inside.append(id(value))
        kind = type(value)
        self._head(_name(kind))
        if kind in _SEQUENCES or (isinstance(value, tuple) and hasattr(value, "_fields")):
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
            self.add(code_of(fn)).captured(fn)
        elif isinstance(fn, (type, types.BuiltinFunctionType, types.MethodDescriptorType)):
            self._head(fn.__module__, fn.__qualname__)
        else:
            raise Undigestable(f"a {_name(type(fn))} {fn!r:.60}")

    def captured(self, fn: Callable[..., Any]) -> None:
        """Take what a function reads that is not an argument, as far as it is plain.

        Numbers, texts, tensors, arrays, functions and modules in its closure, among the globals it names, or in its
        object, count; lists and other things that may be logs do not, nor does what the function itself assigns to.
        The arguments that a partial holds count whatever they are.

        Raises:
            Undigestable: if one of those is something that has no digest.
        """
        if isinstance(fn, functools.partial):
            self.add(list(fn.args)).add(fn.keywords)  # arguments like those of a call, and no logs
            self.captured(fn.func)
            return
        if isinstance(fn, types.MethodType):
            self._object(fn.__self__, fn.__func__)
            fn = fn.__func__
        if not isinstance(fn, types.FunctionType):
            self._object(fn, type(fn).__call__)
            return
        self._known({**named_globals(fn), **closure(fn)}, _stored(fn))
        self._known(dict(enumerate(fn.__defaults__ or ())), set())
        self._known(fn.__kwdefaults__ or {}, set())

    def _object(self, owner: Any, method: Any) -> None:
        if isinstance(owner, torch.nn.Module):
            self._module(owner)
        else:
            self._known(getattr(owner, "__dict__", {}), _stored(method))

    def _known(self, values: dict[Any, Any], stored: set[str]) -> None:
        for name, value in values.items():
            if name in stored:
                continue
            if isinstance(value, types.FunctionType):
                self.add(name).add(code_of(value))
            elif _is_plain(value):
                self.add(name).add(value)


def _is_plain(value: Any) -> bool:
    """Whether it is data, and no log or tool."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return (
        type(value) in (*_BY_TEXT, float, bytes)
        or isinstance(value, (torch.Tensor, torch.nn.Module))
        or is_array(value)
    )


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


def _stored(fn: Any) -> set[str]:
    """The names that a function assigns to: what it counts or keeps there is no input."""
    fn = inspect.unwrap(getattr(fn, "__func__", fn))
    return set(_assigned(fn.__code__)) if isinstance(fn, types.FunctionType) else set()


@functools.lru_cache(maxsize=1024)
def _assigned(code: types.CodeType) -> frozenset[str]:
    inner = [_assigned(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    own = {i.argval for i in dis.get_instructions(code) if i.opname in _STORES}
    return frozenset(own.union(*inner))
