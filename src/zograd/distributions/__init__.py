"""Distributions of directions: what is added to the parameters, one file a family."""

from zograd.distributions.base import Dense, Distribution
from zograd.distributions.gaussian import Gaussian
from zograd.distributions.low_rank import LowRank
from zograd.distributions.rademacher import Rademacher
from zograd.distributions.sphere import Sphere

__all__ = ["Dense", "Distribution", "Gaussian", "LowRank", "Rademacher", "Sphere"]
