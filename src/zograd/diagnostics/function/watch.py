"""What a function can reach beside its differentiated arguments, and whether a call changed it."""

from __future__ import annotations

import pickle
import random
import sys
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zograd._base.reach import CONTAINERS, MANY, Step, is_array, reach

if TYPE_CHECKING:
    from collections.abc import Iterator


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


class Picture:
    """How everything that a function can reach is now, by the names under which its author knows it.

    Tensors, arrays and generators are compared by their values, containers by what they hold, other objects by their
    attributes, or by their pickles if they have none. What is none of these is not looked at.

    Args:
        fn: the function.
        others: further objects by name.
    """

    def __init__(self, fn: Any, others: dict[str, Any]) -> None:
        self._fn, self._others = fn, others
        self._kept: dict[str, dict[str, tuple[Any, Any]]] = {}
        for name, path, value in self._things():
            self._kept.setdefault(name, {})[path] = value, _snapshot(value)

    def changed(self) -> tuple[str, ...]:
        """The names of what is not as it was."""
        now: dict[str, dict[str, Any]] = {}
        for name, path, value in self._things():
            now.setdefault(name, {})[path] = _snapshot(value)
        return tuple(name for name, kept in self._kept.items() if not _alike(kept, now.get(name)))

    def restore(self) -> None:
        """Give tensors and arrays their values, and parameters their gradients, as they were."""
        for kept in self._kept.values():
            for value, before in kept.values():
                if isinstance(value, torch.Tensor) or is_array(value):
                    _put_back(value, before)

    def _things(self) -> Iterator[tuple[str, str, Any]]:
        for here in reach(self._fn):
            if here.first is not None:
                yield _told(here.first), here.path, here.value
        for name, thing in self._others.items():
            for here in reach(thing):
                yield name, here.path, here.value


def _told(step: Step) -> str:
    """How a report calls a variable."""
    if step.kind == "closure":
        return f"`{step.text}`, which it closes over"
    return {
        "global": f"the global `{step.text}`",
        "default": f"the default of `{step.text}`",
        "partial": "the arguments of the partial",
    }.get(step.kind, "self")


def _alike(kept: dict[str, tuple[Any, Any]], now: dict[str, Any] | None) -> bool:
    if now is None or kept.keys() != now.keys():
        return False
    return all(_same(before, now[path]) for path, (_, before) in kept.items())


def _put_back(tensor: Any, value: tuple[Any, ...]) -> None:
    if isinstance(tensor, torch.Tensor):
        if not tensor.is_inference() and not _same(tensor.detach(), value[0]):
            with torch.no_grad():
                tensor.copy_(value[0])
        if tensor.is_leaf and not _same(tensor.grad, value[1]):
            tensor.grad = value[1]
    elif tensor.ndim and not _same(tensor, value[0]) and tensor.flags.writeable:
        tensor[...] = value[0]


def _snapshot(value: Any) -> Any:
    """What tells whether a thing itself has changed; what it holds is looked at by itself."""
    if isinstance(value, torch.Tensor):
        grad = value.grad if value.is_leaf else None
        return value.detach().clone(), None if grad is None else grad.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if is_array(value) and value.dtype.kind != "O":
        return value.copy(), None
    if isinstance(value, nn.Module):
        return value.training
    if type(value) in CONTAINERS and len(value) <= MANY:
        return list(value) if isinstance(value, dict) else len(value)
    if isinstance(value, (types.FunctionType, types.MethodType, types.ModuleType, type)) or hasattr(value, "__dict__"):
        return None
    return _pickled(value)


def _pickled(thing: Any) -> bytes | None:
    try:
        return pickle.dumps(thing)
    except Exception:  # whatever an object's own __reduce__ raises
        return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if is_array(a) and is_array(b):
        return bool(a.shape == b.shape and a.tobytes() == b.tobytes())
    return type(a) is type(b) and bool(a == b)
