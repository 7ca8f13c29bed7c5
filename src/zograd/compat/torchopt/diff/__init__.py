"""``torchopt.diff``: the decorator, which is also a module of that name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    zero_order: Any  # a module that can be called, which type checkers know nothing of
else:
    zero_order = importlib.import_module("zograd.compat.torchopt.diff.zero_order")

__all__ = ["zero_order"]


def __dir__() -> list[str]:
    return __all__
