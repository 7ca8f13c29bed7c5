r"""Finite-difference schemes as data.

A scheme is a row of offsets :math:`c_j` and weights :math:`w_j`: along a direction :math:`\epsilon` it evaluates ``fn``
at :math:`\theta + \sigma c_j \epsilon` and combines the values to the coefficient :math:`\sum_j w_j f(\theta + \sigma
c_j \epsilon)`. A new formula is a new row of numbers, never a new function.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["ANTITHETIC", "FORWARD", "FOURTH_ORDER", "NAIVE", "SCHEMES", "Scheme"]


def __dir__() -> list[str]:
    return list(__all__)


_TOLERANCE = 1e-9  # weights such as 2/3 are not exact in binary


@dataclass(frozen=True)
class Scheme:
    r"""Offsets and weights of a directional difference, checked when made.

    For Gaussian directions the estimate has the mean :math:`\sum_j w_j c_j \nabla f_{|c_j| \sigma}(\theta)`, where
    :math:`f_s(\theta) = \mathbb{E} f(\theta + s z)`; with :math:`\sum_j w_j c_j = 1` that is the gradient up to
    :math:`O(\sigma^2)`.

    Args:
        offsets: where ``fn`` is evaluated, in units of ``sigma`` times the direction. Offset 0 is the center, which
            all directions share.
        weights: one factor for each offset, with ``sum(w * c) == 1``: otherwise the gradient would be scaled.
        name: how ``repr`` and errors call the scheme.

    Raises:
        ValueError: if the offsets and weights do not make a difference quotient.

    Examples:
        >>> Scheme(offsets=(1.0, -1.0), weights=(0.5, -0.5)).order
        2
        >>> Scheme((1.0, -1.0), (1.0, -1.0))
        Traceback (most recent call last):
        ...
        ValueError: `Scheme(offsets=..., weights=(1.0, -1.0))` must have sum(weights * offsets) == 1, got 2.0.

    References:
        Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation" (1992);
        Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning" (arXiv:1703.03864).
    """

    offsets: tuple[float, ...]
    weights: tuple[float, ...]
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(float(c) for c in self.offsets))
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        typed = f"`Scheme(offsets={self.offsets}, weights={self.weights})`"
        if len(self.offsets) != len(self.weights):
            raise ValueError(
                f"{typed} must have as many weights as offsets, got {len(self.weights)} and {len(self.offsets)}."
            )
        if not all(map(math.isfinite, self.offsets + self.weights)):
            raise ValueError(f"{typed} must have finite numbers only.")
        if len(set(self.offsets)) != len(self.offsets):
            raise ValueError(f"{typed} must not have an offset twice.")
        if abs(self._moment(1) - 1) > _TOLERANCE:
            raise ValueError(f"{typed} must have sum(weights * offsets) == 1, got {self._moment(1)}.")

    def _moment(self, power: int) -> float:
        return math.fsum(w * c**power for w, c in zip(self.weights, self.offsets, strict=True))

    @functools.cached_property
    def uses_center(self) -> bool:
        """Whether the value at the center is part of the difference."""
        return 0.0 in self.offsets

    @functools.cached_property
    def sides(self) -> tuple[float, ...]:
        """The offsets without the center, each of which is one evaluation for each direction."""
        return tuple(c for c in self.offsets if c)

    @property
    def order(self) -> int:
        """The power of ``sigma`` in the error of the directional derivative, as a finite difference."""
        powers = range(2, 2 * len(self.offsets) + 2)
        return next((p for p in powers if abs(self._moment(p)) > _TOLERANCE), powers.stop) - 1

    @property
    def is_difference(self) -> bool:
        """Whether a constant added to ``fn`` leaves the coefficients alone."""
        return abs(self._moment(0)) <= _TOLERANCE

    @property
    def sides_cancel(self) -> bool:
        """Whether a constant added to all values but the center's leaves the coefficients alone."""
        return abs(math.fsum(w for c, w in zip(self.offsets, self.weights, strict=True) if c)) <= _TOLERANCE

    def combine(self, sides: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        r"""The coefficients :math:`\sum_j w_j f_{ij}` of some directions.

        Args:
            sides: values of shape ``(directions, len(self.sides), *out)``, the center left out.
            center: the value at the center, of shape ``out``.

        Returns:
            Coefficients of shape ``(directions, *out)``.
        """
        # Elementwise, so that the bits cannot depend on how many directions come at once.
        columns = iter(sides.unbind(1))
        terms = [w * (next(columns) if c else center) for c, w in zip(self.offsets, self.weights, strict=True)]
        return functools.reduce(operator.add, terms)

    def __repr__(self) -> str:
        return self.name or f"Scheme(offsets={self.offsets}, weights={self.weights})"


NAIVE = Scheme((1.0,), (1.0,), name="NAIVE")
r"""The value itself, :math:`f(\theta + \sigma \epsilon)`; of order 1. Its variance grows with the square of the level
of ``fn``, which nothing takes off."""
FORWARD = Scheme((0.0, 1.0), (-1.0, 1.0), name="FORWARD")
r"""The forward difference, :math:`f(\theta + \sigma \epsilon) - f(\theta)`; of order 1."""
ANTITHETIC = Scheme((1.0, -1.0), (0.5, -0.5), name="ANTITHETIC")
r"""The central difference, :math:`\frac12 (f(\theta + \sigma \epsilon) - f(\theta - \sigma \epsilon))`; of order 2."""
FOURTH_ORDER = Scheme((1.0, -1.0, 2.0, -2.0), (2 / 3, -2 / 3, -1 / 12, 1 / 12), name="FOURTH_ORDER")
r"""Central differences at one and two steps, :math:`\frac23 (f_1 - f_{-1}) - \frac1{12} (f_2 - f_{-2})` with
:math:`f_c = f(\theta + c \sigma \epsilon)`; of order 4."""

SCHEMES = {"naive": NAIVE, "forward": FORWARD, "antithetic": ANTITHETIC, "fourth_order": FOURTH_ORDER}
"""The names that ``method=`` accepts."""
