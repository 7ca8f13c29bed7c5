"""Modules whose parameters get their gradient from the values of ``forward``."""

from zograd.nn.modules import ZeroOrder, ZeroOrderGradientModule

__all__ = ["ZeroOrder", "ZeroOrderGradientModule"]


def __dir__() -> list[str]:
    return list(__all__)
