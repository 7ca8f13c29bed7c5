"""Replicas of a module: evaluated in its place, so that nothing is ever written to the module itself.

A replica has the module's classes and settings, other tensors in place of its parameters, and buffers and containers of
its own. Threads can share a module, an exception leaves nothing behind, and what one evaluation logs or counts does not
reach the next.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zograd._base.reach import CONTAINERS, is_tuple
from zograd._base.torch_private import REGISTRIES, registries, viewed

if TYPE_CHECKING:
    from collections.abc import Callable


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
        self._replicas: dict[int, Any] = {}  # by the id of what they stand for: one each, however often it is held
        self._originals: dict[int, Any] = {}  # and back
        self._containers: list[tuple[Any, Any]] = []
        self._pairs = [(m, self._remember(m, object.__new__(type(m)))) for m in module.modules()]
        for original, replica in self._pairs:
            if isinstance(original, torch.jit.ScriptModule):
                raise TypeError(f"{type(original).__name__} cannot be evaluated with other parameters: it is compiled.")
            replica.__dict__.update(self._state(original))
        self._before = [dict(replica.__dict__) for _, replica in self._pairs]
        self.module: nn.Module = self._replicas[id(module)]

    def _remember(self, original: Any, replica: Any) -> Any:
        self._replicas[id(original)] = replica
        self._originals[id(replica)] = original
        return replica

    def _state(self, module: nn.Module) -> dict[str, Any]:
        state = {name: self._mapped(value) for name, value in module.__dict__.items() if name not in REGISTRIES}
        parameters, buffers, modules = registries(module)
        copies = (
            {k: p if p is None else self._tensor(p) for k, p in parameters.items()},
            {k: b if b is None else self._buffer(b) for k, b in buffers.items()},
            {k: m if m is None else self._replicas[id(m)] for k, m in modules.items()},
        )
        state.update(zip(REGISTRIES, copies, strict=True))
        return state

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        replaced = self._tensors.get(id(tensor))
        if replaced is None:
            return tensor
        self._remember(tensor, replaced)
        return replaced

    def _buffer(self, buffer: torch.Tensor) -> torch.Tensor:
        if id(buffer) not in self._replicas:
            self._remember(buffer, self._copy_buffer(buffer))
        replica: torch.Tensor = self._replicas[id(buffer)]
        return replica

    def _mapped(self, value: Any) -> Any:
        """The value as the copy should hold it: containers copied, modules and parameters in them replaced."""
        if id(value) in self._replicas:
            return self._replicas[id(value)]
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self._replicas.get(id(value.__self__), value.__self__))
        if is_tuple(value):
            return self._remember(value, tuple.__new__(type(value), map(self._mapped, value)))
        if type(value) in CONTAINERS:
            replica = self._remember(value, copy.copy(value))
            self._containers.append((value, replica))
            _fill(replica, self._mapped, value)
            return replica
        return value

    def commit(self) -> None:
        """Let the module have what the copy's evaluation wrote: attributes, containers, buffers; never parameters.

        Raises:
            RuntimeError: if ``forward`` registered or removed a parameter or submodule.
        """
        for (module, replica), before in zip(self._pairs, self._before, strict=True):
            (parameters, buffers, modules), made = registries(module), registries(replica)
            if made[0].keys() != parameters.keys() or made[2].keys() != modules.keys():
                raise RuntimeError(
                    f"`{type(module).__name__}.forward` registered or removed a parameter or submodule, which would "
                    "differ between evaluations: make them in `__init__`, or by one call under `torch.no_grad()`."
                )
            for name in before.keys() - replica.__dict__.keys():
                del module.__dict__[name]
            for name, value in replica.__dict__.items():
                if name not in REGISTRIES and (name not in before or before[name] is not value):
                    module.__dict__[name] = self._given_back(value)
            for name, buffer in made[1].items():
                _commit_buffer(buffers, name, buffer)
        for original, replica in self._containers:
            now = [self._given_back(v) for v in _items(replica)]
            if _keys(original) != _keys(replica) or any(a is not b for a, b in zip(_items(original), now, strict=True)):
                _fill(original, self._given_back, replica)

    def _given_back(self, value: Any) -> Any:
        """The inverse of ``_mapped``: what the module itself may hold."""
        if id(value) in self._originals:
            return self._originals[id(value)]
        if is_tuple(value):
            return tuple.__new__(type(value), map(self._given_back, value))
        if type(value) in CONTAINERS:
            fresh = copy.copy(value)
            _fill(fresh, self._given_back, value)
            return fresh
        return value


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else [len(container)]


def _fill(container: Any, function: Callable[[Any], Any], source: Any) -> None:
    """Let a container hold the function's values of what another of its kind holds."""
    if isinstance(source, dict):
        items = [(k, function(v)) for k, v in source.items()]
        container.clear()
        for k, v in items:
            container[k] = v
        return
    items = list(map(function, source))
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(items)


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
        self.error: RuntimeError | None = None  # kept, in case forward itself catches it

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                name = self._names.get(id(item))
                if name is None and isinstance(item, torch.Tensor):
                    name = self._names.get(id(viewed(item)))
                if name is not None:
                    self.error = self._error(name)
                    raise self.error
        return func(*args, **(kwargs or {}))

    def _error(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"`{self._owner}` reaches its parameter {name!r} in `forward` through an object that is neither a "
            "submodule nor a "
            "list, tuple or dict of them (a closure, a helper object, a view made in `__init__`?), where it cannot be "
            "perturbed. Reach it through `self`, or pass it as an argument."
        )
