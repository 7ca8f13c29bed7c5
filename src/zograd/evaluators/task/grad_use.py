"""Uses of autograd inside fn, seen before they happen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zograd._base.torch_private import engine_watched, transforms_active

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._base.trees import Leaves


class NeedsGrad(BaseException):
    """fn is about to use autograd at a point that does not require grad; not for its own ``except Exception``."""


class WatchAutograd:
    """Stops fn where it first uses autograd, before anything has happened that a second try would repeat.

    Without this, ``backward()`` on a loss of a point and of a tensor that does require grad would pass over the point,
    and an optimizer likewise: the value would be another than in a plain call, without any sign. It is no mode of
    torch's, under which fused encoders take another path than at the other points.

    Args:
        params: the point.
        asks: whether a question about a tensor's gradient counts, too; a module's parameters answer it themselves.
    """

    def __init__(self, params: Leaves, *, asks: bool) -> None:
        self.seen = False
        self._params = [leaf for leaf in params if type(leaf) is torch.Tensor] if asks else []
        self._engine = engine_watched(self._used)

    def __enter__(self) -> WatchAutograd:
        for leaf in self._params:
            leaf.__class__ = _Asked
            leaf.tell = self._tell  # type: ignore[attr-defined]
        self._engine.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._engine.__exit__(*error)
        for leaf in self._params:
            leaf.__class__ = torch.Tensor
            del leaf.tell  # type: ignore[attr-defined]

    def _used(self) -> None:
        if not transforms_active():  # one inside fn brings its own tensors
            self._tell()

    def _tell(self) -> None:
        self.seen = True
        raise NeedsGrad


class _Asked(torch.Tensor):
    """A tensor that tells of questions about its gradient, and is otherwise like any other."""

    __torch_function__ = nn.Parameter.__torch_function__  # none: torch takes the path that it takes for plain tensors
    tell: Callable[[], None]

    @property
    def requires_grad(self) -> bool:
        _answered(self)
        return _plain(self).requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override]
        _answered(self)
        return None

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        _answered(self)
        return super().register_hook(hook)  # type: ignore[no-untyped-call]

    def retain_grad(self) -> None:
        _answered(self)
        super().retain_grad()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copied = self.detach().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(_plain(self))


def _answered(leaf: _Asked) -> None:
    # torch's compiler and printer ask on their own account.
    if not sys._getframe(2).f_globals.get("__name__", "").startswith("torch._"):
        leaf.tell()


def _plain(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.as_subclass(torch.Tensor)


def wants_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument does not require grad."""
    return isinstance(error, NeedsGrad) or any(sign in str(error) for sign in ("not require grad", "NoneType"))


def refuses_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument requires grad, which numpy will not have."""
    return "numpy() on Tensor that requires grad" in str(error)
