"""What an estimate is made of, what it makes of values, and what no right number comes from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zograd.errors import EvaluationError, NonFiniteError, ZeroOrderWarning
from zograd.evaluators.task.objective import all_finite
from zograd.failures import RAISE, Drop, Policy
from zograd.shaping import leave_one_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._base.trees import Space
    from zograd.distributions.base import Distribution
    from zograd.evaluators.base import Evaluator
    from zograd.evaluators.task.objective import Objective
    from zograd.sampling import Until
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping


@dataclass(frozen=True)
class Settings:
    """What an estimate is made of, besides ``fn``, its arguments and the seed.

    Attributes:
        distribution: the family of the directions.
        scheme: the offsets and weights.
        num_samples: directions, N; with ``until`` the most of them.
        sigma: the smoothing radius of each differentiated leaf.
        evaluator: how ``fn`` is called on points.
        shaping: what is done to the values first.
        policy: what a failed evaluation means.
        surrogate: a differentiable approximation of ``fn``.
        until: when to stop before ``num_samples``.
        first_only: why the estimate has no second derivative, whatever the other settings are.
    """

    distribution: Distribution
    scheme: Scheme
    num_samples: int
    sigma: tuple[float, ...]
    evaluator: Evaluator
    shaping: Shaping | None = None
    policy: Policy = RAISE
    surrogate: Callable[..., Any] | None = None
    until: Until | None = None
    first_only: str | None = None

    @property
    def evaluations(self) -> int:
        """Points of an estimate, the center included."""
        return 1 + self.num_samples * len(self.scheme.sides)

    def no_second(self, *, scalar: bool) -> str | None:
        """Return why the estimates have no second derivative, with the way out, or None if they have one."""
        family, num = self.distribution, self.num_samples
        if self.first_only is not None:
            return self.first_only
        if not family.gaussian_marginals:
            return f"Stein's identity needs Gaussian marginals, which {family} has not: use `Gaussian()`"
        if self.shaping not in (None, leave_one_out):
            name = getattr(self.shaping, "__name__", self.shaping)
            return f"`shaping={name}` changes what is estimated: use `shaping=None`"
        if not scalar and not (family.independent and num > 1):
            return (
                "for a function of several values it needs two independent directions or more, got "
                f"num_samples={num} of {family}"
            )
        return None


def combine(settings: Settings, values: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    r"""Return the coefficients :math:`a_i = \sum_j w_j f_{ij}`, of the values as the shaping makes them.

    Those of dropped directions are zero, and the others such that the mean over all directions is that over the
    survivors.

    Args:
        settings: what the estimate is made of.
        values: float64, of shape (directions, offsets, *out).
        center: the value at the center, of shape ``out``.

    Returns:
        float64, of shape (directions, *out).
    """
    alive = survivors(settings.policy, values)
    rows = values if alive is None else values[alive]
    made = _shaped(settings, rows, center) if settings.shaping else settings.scheme.combine(rows, center)
    return made if alive is None else among_all(made, alive)


def survivors(policy: Policy, values: torch.Tensor) -> torch.Tensor | None:
    """Return a mask of the directions that were not dropped; None if that is all of them."""
    if policy.drop is None:
        return None
    alive = finite_rows(values)
    return None if bool(alive.all()) else alive


def _shaped(settings: Settings, values: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    assert settings.shaping is not None
    baseline = center if settings.scheme.uses_center else torch.zeros_like(center)
    shaped = settings.shaping(values - baseline)
    if not isinstance(shaped, torch.Tensor) or shaped.shape != values.shape:
        got = tuple(shaped.shape) if isinstance(shaped, torch.Tensor) else type(shaped).__name__
        raise ValueError(
            f"`zero_order(shaping=...)` must keep the shape of the values, {tuple(values.shape)}, got {got}."
        )
    if not all_finite(shaped):
        raise NonFiniteError(f"`zero_order(shaping=...)` made non-finite values of finite ones: {settings.shaping}.")
    return settings.scheme.combine(shaped.to(values), torch.zeros_like(center))


def finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Return a mask of the directions whose values are all finite."""
    return torch.isfinite(values).flatten(1).all(dim=1)


def among_all(rows: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Return rows of the survivors among all, such that the mean over all is that over the survivors."""
    out = rows.new_zeros((len(alive), *rows.shape[1:]))
    out[alive] = rows * (len(alive) / len(rows))
    return out


def check_center(settings: Settings, center: torch.Tensor, space: Space, objective: Objective) -> None:
    """Refuse a shape of values that these settings have no gradient of."""
    shape, until = tuple(center.shape), settings.until
    if settings.shaping is not None and shape:
        raise ValueError(
            f"`zero_order(shaping=...)` is for objectives of one value, got the shape {shape} from {objective.name}."
        )
    if until is not None and center.numel() != space.slices:
        raise ValueError(f"`zero_order(num_samples={until})` is for objectives of one value, got the shape {shape}.")
    if space.batch_dim is not None and (len(shape) <= space.batch_dim or shape[space.batch_dim] != space.slices):
        raise ValueError(
            f"`zero_order(batch_dim={space.batch_dim})`: {objective.name} must return one entry a slice, "
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


def leaves_unread(settings: Settings, objective: Objective) -> tuple[int, ...]:
    """Return the leaves whose gradient is zero since no evaluation has read them, and say so."""
    unread, names = objective.unread()
    if not names:
        return ()
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    mixes = settings.distribution.mixes
    what = f"{settings.distribution} moves them all the same" if mixes else "their gradient is zero"
    warnings.warn(
        f"{objective.name} read {len(names)} of its parameters at no point, {listed}: {what}. Usual reasons: a head "
        "that the loss does not use, adapters that are merged or disabled (`eval()` merges some), a weight kept from "
        "an earlier call, code that reads it past Python (TorchScript, `torch.cond`).",
        ZeroOrderWarning,
        stacklevel=2,
    )
    return () if mixes else unread


def warn_of_dropped(lost: int, num: int, name: str) -> None:
    """The gradient is there, and who reads it should know of what."""
    warnings.warn(
        f"{lost} of {num} directions were dropped since an evaluation of {name} failed; the gradient is the mean over "
        "the others. It is biased if failure depends on the point: see `zograd.failures.Drop`.",
        ZeroOrderWarning,
        stacklevel=2,
    )
