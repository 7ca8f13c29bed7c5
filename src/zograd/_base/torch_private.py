"""Placeholder until the branch `private` is merged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

_NOTHING = contextlib.nullcontext()


def transforms_active() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def transform_depth() -> int:
    return len(torch._C._functorch.get_interpreter_stack() or ())


def is_transformed(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)


def is_legacy_batched(leaf: torch.Tensor) -> bool:
    return bool(torch._C._functorch.is_legacy_batchedtensor(leaf))


def forward_mode_active() -> bool:
    return bool(forward_ad._current_level >= 0)


def forward_mode_enabled() -> Any:
    return forward_ad._set_fwd_grad_enabled(True)


def random_allowed() -> Any:
    torch._C._vmapmode_increment_nesting()
    levels = torch._C._vmapmode_decrement_nesting()
    return _outside(levels) if levels else _NOTHING


@contextlib.contextmanager
def _outside(levels: int) -> Iterator[None]:
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(levels):
            torch._C._vmapmode_increment_nesting()


def without_function_modes() -> Any:
    return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() else _NOTHING
