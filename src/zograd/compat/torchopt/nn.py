"""``torchopt.nn``: the module."""

from zograd.nn import ZeroOrderGradientModule

__all__ = ["ZeroOrderGradientModule"]


def __dir__() -> list[str]:
    return __all__
