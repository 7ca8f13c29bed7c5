"""The precision of what zograd itself computes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["full_precision"]

_NOTHING = contextlib.nullcontext()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast: a matrix product of ours in bfloat16 would round points or gradient to three digits."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _NOTHING
