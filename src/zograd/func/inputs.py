"""What a decorated function may be called with, and what is said to who calls it with something else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.trees import unsupported
from zograd.errors import ZeroOrderWarning

if TYPE_CHECKING:
    from collections.abc import Sequence


def refuse(params: Sequence[torch.Tensor], call: str, argnums: tuple[int, ...], batch_dim: int | None) -> None:
    """Say why no point can be made of some differentiated tensors, if that is so."""
    typed = f"`{call}(argnums={argnums})`"
    for p in params:
        kind = unsupported(p)
        if kind:
            raise TypeError(
                f"{typed}: differentiated tensors must be dense and real, got {kind} of shape {tuple(p.shape)}."
            )
    if len({p.device for p in params}) > 1:
        raise ValueError(
            f"{typed}: differentiated tensors must be on one device, got {sorted({str(p.device) for p in params})}."
        )
    if not any(p.numel() for p in params):
        raise ValueError(
            f"{typed}: the differentiated tensors have no elements, got shapes {[tuple(p.shape) for p in params]}."
        )
    if batch_dim is not None:
        _check_slices(params, batch_dim, call)


def _check_slices(params: Sequence[torch.Tensor], batch_dim: int, call: str) -> None:
    typed, shapes = f"`{call}(batch_dim={batch_dim})`", [tuple(p.shape) for p in params]
    if any(p.dim() <= batch_dim for p in params):
        raise ValueError(f"{typed}: every differentiated tensor must have that dimension, got shapes {shapes}.")
    if len({p.shape[batch_dim] for p in params}) > 1:
        raise ValueError(f"{typed}: differentiated tensors must have equally many slices, got shapes {shapes}.")


def warn_of_lost_gradients(shape: torch.Size, typed: str, *, module: bool) -> None:
    """Say at the call that a tensor which requires grad gets none."""
    remedy = (
        "Parameters alone do: detach it, or decorate a function of it by `zograd.zero_order`."
        if module
        else "Name its argument in `argnums`, or detach it."
    )
    warnings.warn(
        f"{typed} gets a tensor of shape {tuple(shape)} that requires grad outside its differentiated arguments: it "
        f"gets no gradient through this call. {remedy}",
        ZeroOrderWarning,
        stacklevel=4,
    )


def instead(argnums: tuple[int | str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What stands where the tensors should, and what to write for the kinds of it that are met most."""
    found = args[argnums[0]] if isinstance(argnums[0], int) else kwargs[argnums[0]]
    got = f", got {type(found).__name__}"
    if isinstance(found, torch.nn.Module):
        return (
            f"{got}: use `zograd.nn.ZeroOrder(module, ...)`, or pass its parameters, `dict(module.named_parameters())`"
        )
    if isinstance(found, Iterator):
        return f"{got}: pass `list(...)` of it, or a dict"
    if isinstance(found, (float, int)) or (hasattr(found, "__array__") and not isinstance(found, torch.Tensor)):
        return f"{got}: pass `torch.tensor(...)` of it, in floating point, with `requires_grad=True` for `backward()`"
    return f"{got} of {found.dtype}" if isinstance(found, torch.Tensor) else got
