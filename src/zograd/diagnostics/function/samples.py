"""Antithetic estimates as samples: slopes along their directions for every scheme, and the gradient's length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from zograd.distributions.directions import project
from zograd.estimate.statistics import Groups, Length, length
from zograd.schemes import ANTITHETIC

if TYPE_CHECKING:
    from zograd.estimate.result import Estimate
    from zograd.schemes import Scheme


@dataclass(frozen=True)
class Samples:
    """An antithetic estimate, whose values have those of the forward and the naive scheme among them."""

    estimate: Estimate

    @property
    def sigma(self) -> float:
        """The largest radius of a leaf."""
        return max(self.estimate.sigma)

    @property
    def varies(self) -> bool:
        """Whether any value is another than the center's."""
        return bool((self.estimate.values != self.estimate.center).any())

    def coefficients(self, scheme: Scheme) -> torch.Tensor:
        """Return a scheme's coefficients over sigma: an estimate of the slope along each direction, (N,)."""
        made = self.estimate
        return scheme.combine(made.values[:, : len(scheme.sides)], made.center).cpu() / self.sigma

    @cached_property
    def slopes(self) -> torch.Tensor:
        """The antithetic estimates of the slope along each direction, (N,)."""
        return self.coefficients(ANTITHETIC)

    def slopes_of(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the slopes of a linear function of that flat gradient, without any error."""
        d, radii = self.estimate.directions, self.estimate.sigma
        leaves = zip(d.space.split(gradient.to(d.space.dtype)), radii, strict=True)
        scaled = d.space.join(tuple(leaf * radius**2 for leaf, radius in leaves))
        dots = project(d, radii, scaled)[:, 0].cpu()
        return dots * (len(d) / d.distribution.scale(d.space) / self.sigma)

    def length_of(self, slopes: torch.Tensor) -> Length:
        """Return the length of the vector that has these slopes."""
        return length(Groups(self.estimate.directions, self.estimate.sigma), slopes)

    @cached_property
    def length(self) -> Length:
        """The length of the gradient."""
        return self.length_of(self.slopes)

    def best_length(self, *, smooth: bool) -> Length:
        """Return the length of the gradient, with the best guess at its square.

        Where it does not show in the products of parts, and the function is smooth at this sigma, the mean square of
        the slopes serves: of a linear function that is the squared length.
        """
        if self.length.resolved or not smooth:
            return self.length
        squares = self.slopes.square()
        return self.length.replace(float(squares.mean()), float(squares.std()) / math.sqrt(len(squares)))
