"""Checks of radii, values and gradients that no right number comes from."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch

from zograd.errors import EvaluationError, NonFiniteError, ZeroOrderWarning
from zograd.evaluators.task.objective import all_finite

if TYPE_CHECKING:
    from zograd._base.trees import Leaves, Space
    from zograd.failures import Drop
    from zograd.sampling import Until
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping

_CLEAR = {dtype: 100 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""Radii that are looked at no further; half precision always is."""


def check_radii(sigma: tuple[float, ...], scheme: Scheme, dtype: torch.dtype, call: str) -> None:
    """Refuse a step that the compute dtype cannot hold; torch's own error would name neither."""
    largest = max(sigma) * max(map(abs, scheme.sides))
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"`{call}(sigma=...)` must make steps within the range of {dtype}, at most {torch.finfo(dtype).max:.3g}, "
            f"got {max(sigma):g}. Pass float64 tensors, or scale the parameters down."
        )


def warn_below_resolution(params: Leaves, sigma: tuple[float, ...], call: str) -> None:
    """A leaf rounds steps below its resolution away, and with them its gradient."""
    for leaf, radius in zip(params, sigma, strict=True):
        if radius > _CLEAR.get(leaf.dtype, math.inf):
            continue  # the mean would cost time in each estimate, and few parameters are that large
        typical = float(leaf.abs().mean(dtype=torch.promote_types(leaf.dtype, torch.float32)))
        resolution = torch.finfo(leaf.dtype).eps * typical
        if radius < resolution / 2:
            warnings.warn(
                f"`{call}(sigma=...)` is {radius:g}, below the resolution of {leaf.dtype} at a typical parameter, "
                f"{resolution:.2g}: most perturbations round to nothing. Use a larger sigma or {_wider(leaf.dtype)}.",
                ZeroOrderWarning,
                stacklevel=2,
            )


def _wider(dtype: torch.dtype) -> str:
    return {torch.float32: "float64 parameters", torch.float64: "smaller parameters"}.get(dtype, "float32 parameters")


def check_center(center: torch.Tensor, space: Space, shaping: Shaping | None, until: Until | None, name: str) -> None:
    """Refuse a shape of values that these settings have no gradient of."""
    shape = tuple(center.shape)
    if shaping is not None and shape:
        raise ValueError(
            f"`zero_order(shaping=...)` is for objectives of one value, got the shape {shape} from {name}."
        )
    if until is not None and center.numel() != space.slices:
        raise ValueError(f"`zero_order(num_samples={until})` is for objectives of one value, got the shape {shape}.")
    if space.batch_dim is not None and (len(shape) <= space.batch_dim or shape[space.batch_dim] != space.slices):
        raise ValueError(
            f"`zero_order(batch_dim={space.batch_dim})`: {name} must return one entry a slice, "
            f"{space.slices} along dimension {space.batch_dim}, got the shape {shape}."
        )


def check_coefficients(coefficients: torch.Tensor) -> None:
    """Raise if differences of finite values overflowed."""
    if not all_finite(coefficients):
        raise NonFiniteError("differences of the values overflow although the values are finite: scale them down.")


def check_gradient(flat: torch.Tensor, cotangent: torch.Tensor | None = None) -> None:
    """Raise if the gradient overflowed; an infinite cotangent is the caller's own (a GradScaler looks for it)."""
    if not all_finite(flat) and (cotangent is None or all_finite(cotangent)):
        raise NonFiniteError(
            f"the gradient is not finite although the values are: their size, or 1/sigma, overflows {flat.dtype}. "
            "Scale the values down, or pass float64 tensors."
        )


def check_survivors(drop: Drop, lost: int, num: int, name: str) -> None:
    """Raise once so many directions are lost that too few can be left."""
    if num - lost < max(1, drop.min_success * num):
        raise EvaluationError(
            f"`Drop(min_success={drop.min_success:g})`: of {num} directions of {name} {lost} failed already, so that "
            f"fewer than {drop.min_success:.0%} can survive. The estimate was stopped."
        )


def warn_of_dropped(lost: int, num: int, name: str) -> None:
    """The gradient is there, and who reads it should know of what."""
    warnings.warn(
        f"{lost} of {num} directions were dropped since an evaluation of {name} failed; the gradient is the mean over "
        "the others. It is biased if failure depends on the point: see `zograd.failures.Drop`.",
        ZeroOrderWarning,
        stacklevel=2,
    )
