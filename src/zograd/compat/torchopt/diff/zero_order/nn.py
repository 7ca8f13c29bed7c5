"""``torchopt.diff.zero_order.nn``: the module."""

from zograd.nn import ZeroOrderGradientModule

__all__ = ["ZeroOrderGradientModule"]
