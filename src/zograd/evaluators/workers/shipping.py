"""What travels to workers: functions by name, tensors without the rest of their memory, exceptions with their story."""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import types
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_INSIDE = ("fn", "__wrapped__", "__func__")  # where decorators keep what they decorate


def pack(value: Any, *, by_value: bool) -> bytes:
    """Pickle a value for another process.

    Args:
        value: the value.
        by_value: whether functions of the main module, lambdas and closures are to be sent as code, which takes
            cloudpickle; else, or if that is not installed, every function goes by its name.

    Returns:
        What ``pickle.loads`` reads.
    """
    file = io.BytesIO()
    _pickler(by_value)(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


@functools.cache
def _pickler(by_value: bool) -> type[pickle.Pickler]:
    base: Any = pickle.Pickler
    if by_value:
        try:
            base = importlib.import_module("cloudpickle").Pickler
        except ImportError:
            by_value = False

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            reduced = _reduced(value, skip_main=by_value)
            if reduced is not NotImplemented or not by_value:
                return reduced
            return super().reducer_override(value)

    return Pickler


def _reduced(value: Any, *, skip_main: bool) -> Any:
    if type(value) is torch.Tensor and value.layout == torch.strided and value.is_leaf:
        # A view would take all the memory with it that it is a view of.
        if value.untyped_storage().nbytes() > value.numel() * value.element_size():
            own: Any = value.detach().clone().requires_grad_(value.requires_grad)
            return own.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    elif isinstance(value, types.FunctionType) and not (skip_main and value.__module__ == "__main__"):
        path = _path(value)
        if path:
            return _find, (value.__module__, value.__qualname__, path)
    elif isinstance(value, types.MethodType):
        return types.MethodType, (value.__func__, value.__self__)  # pickle's own way leads to what decorates it
    return NotImplemented


def _path(fn: types.FunctionType) -> tuple[str, ...]:
    """The attributes that lead from what has the function's name to the function, if a decorator is in between."""
    try:
        found = _find(fn.__module__, fn.__qualname__, ())
    except (ImportError, AttributeError, TypeError):
        return ()
    return next((path for path, inner in _unwrapped(found) if inner is fn), ())


def _unwrapped(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, found
    if len(path) < 4:
        for name in _INSIDE:
            inner = getattr(found, name, None)
            if inner is not None:
                yield from _unwrapped(inner, (*path, name))


def _find(module: str, qualname: str, path: tuple[str, ...]) -> Any:
    found: Any = importlib.import_module(module)
    for name in (*qualname.split("."), *path):
        found = getattr(found, name)
    return found
