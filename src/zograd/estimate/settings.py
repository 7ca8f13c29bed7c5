"""What an estimate is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zograd.distributions.directions import Directions
from zograd.estimate.second_order import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._base.trees import Space
    from zograd.distributions.base import Distribution
    from zograd.evaluators.base import Evaluator
    from zograd.failures import Failures
    from zograd.sampling import Until
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping


@dataclass(frozen=True)
class Recipe:
    """What an estimate is made of, besides ``fn``, its arguments and the seed."""

    distribution: Distribution
    scheme: Scheme
    num_samples: int
    sigma: tuple[float, ...]  # one a differentiated leaf
    evaluator: Evaluator
    shaping: Shaping | None = None
    surrogate: Callable[..., Any] | None = None
    failures: Failures = "raise"
    until: Until | None = None  # stops before num_samples

    @property
    def evaluations(self) -> int:
        """Points of an estimate, the center included."""
        return 1 + self.num_samples * len(self.scheme.sides)

    def directions(self, space: Space, seed: int) -> Directions:
        """The directions that belong to a seed."""
        return Directions(self.distribution, space, seed, self.num_samples)

    def no_curvature(self, *, scalar: bool) -> str | None:
        """Why its estimates have no second derivative, or None if they have one."""
        return refusal(self.distribution, self.shaping, self.num_samples, scalar=scalar)
