"""What an estimate is made of, and the coefficients that it makes of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zograd.errors import NonFiniteError
from zograd.evaluators.task.objective import all_finite
from zograd.failures import dropping
from zograd.shaping import leave_one_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd.distributions.base import Distribution
    from zograd.evaluators.base import Evaluator
    from zograd.failures import Failures
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
        failures: what a failed evaluation means.
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
    failures: Failures = "raise"
    surrogate: Callable[..., Any] | None = None
    until: Until | None = None
    first_only: str | None = None

    @property
    def evaluations(self) -> int:
        """Points of an estimate, the center included."""
        return 1 + self.num_samples * len(self.scheme.sides)

    @property
    def needs_all(self) -> bool:
        """Whether the first coefficient needs all values."""
        return bool(self.shaping or self.until or dropping(self.failures))

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

    def combine(self, values: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        r"""Return the coefficients :math:`a_i = \sum_j w_j f_{ij}`, of the values as the shaping makes them.

        Those of dropped directions are zero, and the others such that the mean over all directions is that over the
        survivors.

        Args:
            values: float64, of shape (directions, offsets, *out).
            center: the value at the center, of shape ``out``.

        Returns:
            float64, of shape (directions, *out).
        """
        alive = self.survivors(values)
        rows = values if alive is None else values[alive]
        made = self._shaped(rows, center) if self.shaping else self.scheme.combine(rows, center)
        return made if alive is None else among_all(made, alive)

    def survivors(self, values: torch.Tensor) -> torch.Tensor | None:
        """Return a mask of the directions that were not dropped; None if that is all of them."""
        if dropping(self.failures) is None:
            return None
        alive = finite_rows(values)
        return None if bool(alive.all()) else alive

    def _shaped(self, values: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        assert self.shaping is not None
        baseline = center if self.scheme.uses_center else torch.zeros_like(center)
        shaped = self.shaping(values - baseline)
        if not isinstance(shaped, torch.Tensor) or shaped.shape != values.shape:
            got = tuple(shaped.shape) if isinstance(shaped, torch.Tensor) else type(shaped).__name__
            raise ValueError(
                f"`zero_order(shaping=...)` must keep the shape of the values, {tuple(values.shape)}, got {got}."
            )
        if not all_finite(shaped):
            raise NonFiniteError(f"`zero_order(shaping=...)` made non-finite values of finite ones: {self.shaping}.")
        return self.scheme.combine(shaped.to(values), torch.zeros_like(center))


def finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Return a mask of the directions whose values are all finite."""
    return torch.isfinite(values).flatten(1).all(dim=1)


def among_all(rows: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Return rows of the survivors among all, such that the mean over all is that over the survivors."""
    out = rows.new_zeros((len(alive), *rows.shape[1:]))
    out[alive] = rows * (len(alive) / len(rows))
    return out
