"""The import paths of TorchOpt's zeroth-order differentiation, for programs written against them.

.. code-block:: python

    import zograd.compat.torchopt as torchopt

    @torchopt.diff.zero_order(distribution, method="naive", argnums=0, num_samples=100, sigma=0.01)
    def loss(params, data): ...

    class Net(torchopt.nn.ZeroOrderGradientModule, method="naive", num_samples=100, sigma=0.01): ...
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from zograd.decorator import zero_order as _zero_order
from zograd.nn import ZeroOrderGradientModule as _ZeroOrderGradientModule

if TYPE_CHECKING:
    from zograd.decorator import ZeroOrderFunction
    from zograd.distributions.adapter import DistributionLike

__all__ = ["diff", "nn"]


def __dir__() -> list[str]:
    return list(__all__)


class _ZeroOrderNamespace:
    """``torchopt.diff.zero_order``: a decorator that is also a module of that name."""

    zero_order = staticmethod(_zero_order)
    nn = SimpleNamespace(ZeroOrderGradientModule=_ZeroOrderGradientModule)

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
        return _zero_order(distribution, method, argnums, num_samples, sigma)

    def __repr__(self) -> str:
        return "<zograd.compat.torchopt.diff.zero_order: zograd.zero_order by TorchOpt's names>"


nn: SimpleNamespace = SimpleNamespace(ZeroOrderGradientModule=_ZeroOrderGradientModule)
diff: SimpleNamespace = SimpleNamespace(zero_order=_ZeroOrderNamespace())
