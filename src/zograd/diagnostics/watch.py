"""What a function can reach beside its differentiated arguments, and whether a call changed it."""

from __future__ import annotations

import functools
import inspect
import pickle
import random
import sys
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zograd._base.trees import take_apart
from zograd.func.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PLAIN = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)  # names that hold no state


class RandomStates:
    """The global random streams of torch, numpy and Python: which of them moved, and all of them back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._states()

    def moved(self) -> tuple[str, ...]:
        """The packages whose stream is not where it was."""
        now = self._states()
        return tuple(name for name, state in self._start.items() if not _same(state, now[name]))

    def restore(self) -> None:
        """Put every stream back."""
        torch.set_rng_state(self._start["torch"])
        random.setstate(self._start["python"])
        if self._start["numpy"] is not None:
            sys.modules["numpy"].random.set_state(self._start["numpy"])
        if "device" in self._start:
            torch.get_device_module(self._device).set_rng_state(self._start["device"], self._device)

    def _states(self) -> dict[str, Any]:
        numpy = sys.modules.get("numpy")  # not imported on anybody's behalf
        states = {
            "torch": torch.get_rng_state(),
            "numpy": numpy.random.get_state() if numpy is not None else None,
            "python": random.getstate(),
        }
        if self._device.type in ("cuda", "xpu"):
            states["device"] = torch.get_device_module(self._device).get_rng_state(self._device)
        return states


class Reach:
    """A picture of everything that a function can reach, by name.

    These are its arguments, what it closes over, the globals that it and the functions of its module name, the object
    it is a method of, and gradients. Objects are compared by their pickles; what does not pickle is not looked at.

    Args:
        fn: the function.
        arguments: further objects by name.
    """

    def __init__(self, fn: Any, arguments: dict[str, Any]) -> None:
        self._find: Callable[[], dict[str, Any]] = lambda: {**dict(_held(fn, set())), **arguments}
        self._kept = {name: _picture(thing) for name, thing in self._find().items()}

    def changed(self) -> tuple[str, ...]:
        """The names of what is not as it was."""
        now = self._find()
        return tuple(
            name for name, kept in self._kept.items() if name not in now or not _same(kept[1], _picture(now[name])[1])
        )

    def restore(self) -> None:
        """Give tensors and arrays their values, and parameters their gradients, as they were."""
        for tensors, before in self._kept.values():
            for tensor, value in zip(tensors, before[: len(tensors)], strict=True):
                _put_back(tensor, value)


def _put_back(tensor: Any, value: tuple[Any, ...]) -> None:
    if isinstance(tensor, torch.Tensor):
        if not tensor.is_inference() and not _same(tensor.detach(), value[0]):
            with torch.no_grad():
                tensor.copy_(value[0])
        if tensor.is_leaf and not _same(tensor.grad, value[1]):
            tensor.grad = value[1]
    elif not _same(tensor, value[0]) and tensor.flags.writeable:
        tensor[...] = value[0]


def _held(thing: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """What a callable holds, by the name under which its author knows it."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(getattr(thing, "options", None), Options):
        yield from _held(thing.fn, seen)
    elif isinstance(thing, functools.partial):
        yield "the arguments of the partial", [thing.args, thing.keywords]
        yield from _held(thing.func, seen)
    elif inspect.ismethod(thing):
        yield "self", _state(thing.__self__)
        yield from _held(thing.__func__, seen)
    elif inspect.isfunction(thing):
        yield from _of_function(thing, seen)
    elif type(thing).__module__.startswith("zograd."):
        return
    elif not isinstance(thing, (type, nn.Module, types.BuiltinFunctionType)):
        yield "self", _state(thing)


def _state(thing: Any) -> Any:
    """An object's attributes one by one, so that one that does not pickle does not hide the others."""
    return thing if isinstance(thing, nn.Module) or not hasattr(thing, "__dict__") else dict(vars(thing))


def _of_function(function: types.FunctionType, seen: set[int]) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield from _named(f"`{name}`, which it closes over", cell.cell_contents, function, seen)
        except ValueError:  # an empty cell
            continue
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield from _named(f"the global `{name}`", function.__globals__[name], function, seen)


def _named(name: str, thing: Any, function: types.FunctionType, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if inspect.isfunction(thing):
        if thing.__module__ == function.__module__:
            yield from _held(thing, seen)
    elif not isinstance(thing, _PLAIN) and not isinstance(getattr(thing, "options", None), Options):
        yield name, thing


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def _picture(thing: Any) -> tuple[list[Any], list[Any]]:
    """The tensors and arrays in a thing, and copies of them followed by the pickles of all else."""
    modules = [leaf for leaf in take_apart(thing)[0] if isinstance(leaf, nn.Module)]
    leaves = [leaf for leaf in take_apart(thing)[0] if not isinstance(leaf, nn.Module)]
    for module in modules:
        leaves += [*module.parameters(), *module.buffers(), [m.training for m in module.modules()]]
    own = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) or _is_array(leaf)]
    rest = [leaf for leaf in leaves if not (isinstance(leaf, torch.Tensor) or _is_array(leaf))]
    return own, [*map(_copy, own), *map(_pickled, rest)]


def _copy(leaf: Any) -> tuple[Any, Any]:
    if not isinstance(leaf, torch.Tensor):
        return leaf.copy(), None
    grad = leaf.grad if leaf.is_leaf else None
    return leaf.detach().clone(), None if grad is None else grad.detach().clone()


def _pickled(thing: Any) -> bytes | None:
    try:
        return pickle.dumps(thing)
    except Exception:  # whatever an object's own __reduce__ raises
        return None


def _is_array(thing: Any) -> bool:
    return type(thing).__module__ == "numpy" and type(thing).__name__ == "ndarray" and thing.dtype.kind != "O"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if _is_array(a) and _is_array(b):
        return bool(a.shape == b.shape and a.tobytes() == b.tobytes())
    return type(a) is type(b) and bool(a == b)
