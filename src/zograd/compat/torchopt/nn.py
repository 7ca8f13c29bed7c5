"""``torchopt.nn``: the module."""

from zograd.nn import ZeroOrderGradientModule

__all__ = ["ZeroOrderGradientModule"]
