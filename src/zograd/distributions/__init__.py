"""Distributions of directions: what is added to the parameters, one file a family."""

from zograd.distributions.base import Dense, Distribution
from zograd.distributions.coordinate import Coordinate
from zograd.distributions.gaussian import Gaussian
from zograd.distributions.guided import Guided
from zograd.distributions.hadamard import Hadamard
from zograd.distributions.low_rank import LowRank
from zograd.distributions.orthogonal import Orthogonal
from zograd.distributions.rademacher import Rademacher
from zograd.distributions.sobol import Sobol
from zograd.distributions.sphere import Sphere

__all__ = [
    "Coordinate",
    "Dense",
    "Distribution",
    "Gaussian",
    "Guided",
    "Hadamard",
    "LowRank",
    "Orthogonal",
    "Rademacher",
    "Sobol",
    "Sphere",
]


def __dir__() -> list[str]:
    return list(__all__)
