"""Replicas of a module: evaluated in its place, so that nothing is ever written to the module itself.

A replica has the module's classes and settings, other tensors in place of its parameters, and buffers and containers of
its own. Threads can share a module, an exception leaves nothing behind, and what one evaluation logs or counts does not
reach the next.
"""

from __future__ import annotations

import collections
import copy
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Replica", "Watch"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, collections.OrderedDict, list, tuple, set, collections.deque)


class Replica:
    """A copy of a module tree in which tensors are replaced by identity.

    Args:
        module: what to copy. Whatever it holds beyond modules, parameters and containers is shared.
        tensors: replacements by the ``id`` of what they replace; a tied weight is one tensor and replaced everywhere.
        copy_buffer: makes a buffer of the copy.
    """

    def __init__(
        self, module: nn.Module, tensors: dict[int, torch.Tensor], copy_buffer: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._tensors = tensors
        self._copy_buffer = copy_buffer
        self._containers: list[tuple[Any, Any]] = []  # those that hold nothing which was replaced, with their copies
        self._modules = {id(m): object.__new__(type(m)) for m in module.modules()}
        self._pairs = [(m, self._modules[id(m)]) for m in module.modules()]
        for original, twin in self._pairs:
            twin.__dict__.update(self._state(original))
        self._before = [dict(twin.__dict__) for _, twin in self._pairs]
        self.module: nn.Module = self._modules[id(module)]

    def _state(self, module: nn.Module) -> dict[str, Any]:
        state = {name: self._mapped(value) for name, value in module.__dict__.items() if name not in _REGISTRIES}
        state["_parameters"] = {
            k: p if p is None else self._tensors.get(id(p), p) for k, p in module._parameters.items()
        }
        state["_buffers"] = {k: b if b is None else self._copy_buffer(b) for k, b in module._buffers.items()}
        state["_modules"] = {k: m if m is None else self._modules[id(m)] for k, m in module._modules.items()}
        return state

    def _mapped(self, value: Any) -> Any:
        """The value as the copy should hold it: containers copied, modules and parameters in them replaced."""
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, torch.Tensor):
            return self._tensors.get(id(value), value)
        if isinstance(value, MethodType) and id(value.__self__) in self._modules:
            return MethodType(value.__func__, self._modules[id(value.__self__)])
        if type(value) in _CONTAINERS:
            return self._copied(value)
        return value

    def _copied(self, value: Any) -> Any:
        new = copy.copy(value)
        if isinstance(value, dict):
            new.update({k: self._mapped(v) for k, v in value.items()})
        elif isinstance(value, tuple):
            return tuple(map(self._mapped, value))
        else:
            items = [self._mapped(v) for v in value]
            new.clear()
            (new.update if isinstance(value, set) else new.extend)(items)
        if all(a is b for a, b in zip(_items(value), _items(new), strict=True)):
            self._containers.append((value, new))
        return new

    def commit(self) -> None:
        """Let the module have what the copy's evaluation wrote: attributes, containers, buffers; never parameters."""
        for (module, twin), before in zip(self._pairs, self._before, strict=True):
            for name in before.keys() - twin.__dict__.keys():
                del module.__dict__[name]
            for name, value in twin.__dict__.items():
                if name not in _REGISTRIES and (name not in before or before[name] is not value):
                    module.__dict__[name] = value
            for name, buffer in twin._buffers.items():
                _commit_buffer(module._buffers, name, buffer)
        for original, twin in self._containers:
            if len(original) != len(twin) or any(
                a is not b for a, b in zip(_items(original), _items(twin), strict=True)
            ):
                original.clear()
                (original.extend if isinstance(original, (list, collections.deque)) else original.update)(twin)


def _items(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _commit_buffer(buffers: dict[str, torch.Tensor | None], name: str, new: torch.Tensor | None) -> None:
    old = buffers.get(name)
    if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
        buffers[name] = new
    else:
        with torch.no_grad():
            old.copy_(new)


class Watch(TorchFunctionMode):
    """Raises where a replica's evaluation uses one of the module's own parameters.

    That happens when ``forward`` reaches a parameter by a way that :class:`Replica` does not know, such as a closure
    over the module: the perturbation would be lost and the gradient too small, without any other sign.

    Args:
        names: the parameters' names by their ``id``.
        owner: how the error calls the module.
    """

    def __init__(self, names: dict[int, str], owner: str) -> None:
        super().__init__()
        self._names = names
        self._owner = owner

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if id(item) in self._names:
                    raise RuntimeError(
                        f"`{self._owner}` reaches its parameter {self._names[id(item)]!r} in `forward` through an "
                        "object that is neither a submodule nor a list, tuple or dict of them (a closure or a helper "
                        "object?), where it cannot be perturbed. Reach it through `self`, or pass it as an argument."
                    )
        return func(*args, **(kwargs or {}))
