"""``torchopt.diff.zero_order``: a module that can be called, as the decorator in it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zograd.compat.torchopt.diff.zero_order import nn
from zograd.func.decorator import zero_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd.distributions.adapter import DistributionLike
    from zograd.func.function import ZeroOrderFunction

__all__ = ["nn", "zero_order"]


class _Callable(ModuleType):
    def __call__(
        self,
        distribution: DistributionLike,
        method: str = "naive",
        argnums: int | tuple[int, ...] = (0,),
        num_samples: int = 1,
        sigma: float = 1.0,
    ) -> Callable[[Callable[..., Any]], ZeroOrderFunction[...]]:
        """:func:`zograd.zero_order` with TorchOpt's arguments.

        Args:
            distribution: one of TorchOpt's three forms.
            method: ``"naive"``, ``"forward"`` or ``"antithetic"``.
            argnums: the differentiated positional arguments.
            num_samples: the number of directions.
            sigma: the smoothing radius.

        Returns:
            A decorator.
        """
        return zero_order(distribution, method, argnums, num_samples, sigma)


sys.modules[__name__].__class__ = _Callable
