"""Replicas of a module: evaluated in its place, so that nothing is ever written to the module itself.

A replica has the module's classes and settings, other tensors in place of its parameters, and buffers and containers of
its own. Threads can share a module, an exception leaves nothing behind, and what one evaluation logs or counts does not
reach the next.
"""

from __future__ import annotations

import collections
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Replica", "Watch"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Replica:
    """A copy of a module tree in which tensors are replaced by identity.

    Args:
        module: what to copy. Whatever it holds beyond modules, parameters and containers of them is shared.
        tensors: replacements by the ``id`` of what they replace; a tied weight is one tensor and replaced everywhere.
        copy_buffer: makes a buffer of the copy; None shares them, for an evaluation that counts as the module's own.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: dict[int, torch.Tensor],
        copy_buffer: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self._tensors = tensors
        self._copy_buffer = copy_buffer
        self._modules = {id(m): object.__new__(type(m)) for m in module.modules()}
        self._pairs = [(m, self._modules[id(m)]) for m in module.modules()]
        for original, copy in self._pairs:
            copy.__dict__.update(self._state(original))
        self._before = [dict(copy.__dict__) for _, copy in self._pairs] if copy_buffer is None else []
        self.module: nn.Module = self._modules[id(module)]

    def _state(self, module: nn.Module) -> dict[str, Any]:
        state = {name: self._mapped(value) for name, value in module.__dict__.items() if name not in _REGISTRIES}
        copy = self._copy_buffer
        state["_parameters"] = {k: p if p is None else self._tensors.get(id(p), p) for k, p in module._parameters.items()}
        state["_modules"] = {k: m if m is None else self._modules[id(m)] for k, m in module._modules.items()}
        state["_buffers"] = {k: b if b is None or copy is None else copy(b) for k, b in module._buffers.items()}
        return state

    def _mapped(self, value: Any) -> Any:  # noqa: ANN401 - any attribute
        """The value as the copy should hold it: modules and parameters of the tree replaced inside containers."""
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, torch.Tensor):
            return self._tensors.get(id(value), value)
        if isinstance(value, MethodType) and id(value.__self__) in self._modules:
            return MethodType(value.__func__, self._modules[id(value.__self__)])
        kind = type(value)
        if kind in (dict, collections.OrderedDict):
            return self._rebuilt(value, kind({k: self._mapped(v) for k, v in value.items()}), value.values())
        if kind in (list, tuple, set, frozenset, collections.deque):
            items = [self._mapped(v) for v in value]
            new = collections.deque(items, value.maxlen) if kind is collections.deque else kind(items)
            return self._rebuilt(value, new, value)
        return value

    def _rebuilt(self, old: Any, new: Any, items: Iterable[Any]) -> Any:  # noqa: ANN401
        """The new container; for the module's own evaluation the old one, unless something in it was replaced."""
        if self._copy_buffer is not None:
            return new
        fresh = new.values() if isinstance(new, dict) else new
        return old if all(a is b for a, b in zip(items, fresh, strict=True)) else new

    def commit(self) -> None:
        """Let the module have what this evaluation assigned: attributes and buffers, never parameters."""
        for (module, copy), before in zip(self._pairs, self._before, strict=True):
            for name in before.keys() - copy.__dict__.keys():
                module.__dict__.pop(name, None)
            for name, value in copy.__dict__.items():
                if name not in _REGISTRIES and before.get(name, self) is not value:
                    module.__dict__[name] = value
            for name, buffer in copy._buffers.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer


class Watch(TorchFunctionMode):
    """Raises where a replica's evaluation uses one of the module's own parameters.

    That happens when ``forward`` reaches a parameter by a way that :class:`Replica` does not know, such as a closure over
    the module: the perturbation would be lost and the gradient too small, without any other sign.

    Args:
        names: the parameters' names by their ``id``.
        owner: how the error calls the module.
    """

    def __init__(self, names: dict[int, str], owner: str) -> None:
        super().__init__()
        self._names = names
        self._owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 - torch's own signature
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if id(item) in self._names:
                    raise RuntimeError(
                        f"`{self._owner}` reaches its parameter {self._names[id(item)]!r} in `forward` through an object that "
                        "is neither a submodule nor a list, tuple or dict of them (a closure or a helper object?), where it "
                        "cannot be perturbed. Reach it through `self`, or pass it as an argument."
                    )
        return func(*args, **(kwargs or {}))
