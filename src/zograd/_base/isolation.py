"""The state that evaluations of a function begin from, and what the center leaves of it.

Every evaluation of an estimate begins from the state that was there before; only the center leaves traces, those of one
plain call. For modules that is made so here. Other functions keep their state to themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zograd._base.replica import Replica, Watch
from zograd._base.torch_private import as_parameter, parametrizations_cached


class ModuleFunction:
    """A module as a function of its trainable parameters: evaluated on replicas that begin where the module was.

    Args:
        module: the module.
        names: the names of the parameters to replace, by their ``id``.
        watches: whether the first evaluation is watched for parameters that it reaches past the replica.
    """

    def __init__(self, module: nn.Module, names: dict[int, str], *, watches: bool = True) -> None:
        self.module: nn.Module = module
        self._names = names
        self._template: nn.Module | None = None
        self._center: Replica | None = None
        self._watched = not watches  # whether a point's evaluation was seen to use no hidden parameter
        if parametrizations_cached():
            raise RuntimeError(
                "a zeroth-order module cannot be evaluated inside `parametrize.cached()`: the cache would serve all "
                "points "
                "the parametrized weight of one."
            )
        self.__qualname__ = type(module).__qualname__

    def __call__(self, params: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a replica with these parameters, as the module was before the center."""
        template = self._frozen()
        like = next(iter(params.values()))

        def copy_buffer(buffer: torch.Tensor) -> torch.Tensor:
            # Under vmap `like` is one of many, and so must be a buffer that forward writes to.
            return like.new_zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device).copy_(buffer)

        replica = Replica(template, self._replacements(params), copy_buffer).module
        if self._watched:
            return nn.Module.__call__(replica, *args, **kwargs)
        with Watch(self._names, type(self.module).__name__) as watch:
            out = nn.Module.__call__(replica, *args, **kwargs)
        if watch.error is not None:
            raise watch.error
        self._watched = True
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        """As the module was before the center, with the parameters that are differentiated, for another process."""
        module = self._frozen()
        parameters = {id(p): p for p in module.parameters()}
        return _again, (module, {name: parameters[identity] for identity, name in self._names.items()})

    def at_center(self, params: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Evaluate as one plain call, whose traces :meth:`commit` leaves on the module."""
        self._frozen()
        self._center = Replica(self.module, self._replacements(params), torch.clone)
        return nn.Module.__call__(self._center.module, *args, **kwargs)

    def commit(self) -> None:
        """Let the module have the buffers and attributes of the center's evaluation, now that the estimate is done."""
        if self._center is not None:
            self._center.commit()

    def _frozen(self) -> nn.Module:
        """The module as it was before the center, which all other points start from."""
        if self._template is None:
            self._template = Replica(self.module, {}, torch.clone).module
        return self._template

    def _replacements(self, params: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        for leaf in params.values():
            as_parameter(leaf)
        return {identity: params[name] for identity, name in self._names.items()}


def _again(module: nn.Module, parameters: dict[str, nn.Parameter]) -> ModuleFunction:
    return ModuleFunction(module, {id(p): name for name, p in parameters.items()})


def leaves_traces(fn: Callable[..., Any]) -> bool:
    """Return whether the center leaves traces, so that it must be evaluated where the function is."""
    return isinstance(fn, ModuleFunction)


def at_center(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return what to call at the center, in place of the function."""
    return fn.at_center if isinstance(fn, ModuleFunction) else fn


def commit(fn: Callable[..., Any]) -> None:
    """Let the traces of the center stay, now that the estimate is done."""
    if isinstance(fn, ModuleFunction):
        fn.commit()
