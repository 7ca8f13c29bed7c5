"""Checks of a setup: of a function and its settings, and of a distribution of directions.

No gradient needs them; they say how good one is.
"""

from zograd.diagnostics.distribution.check import check_distribution
from zograd.diagnostics.distribution.report import DistributionReport, Finding
from zograd.diagnostics.function.advice import Need, Suggestion
from zograd.diagnostics.function.autograd import Autograd
from zograd.diagnostics.function.calls import Calls
from zograd.diagnostics.function.noise import Noise
from zograd.diagnostics.function.pickling import Pickling
from zograd.diagnostics.function.radii import Radius
from zograd.diagnostics.function.vectorized import Vectorized
from zograd.diagnostics.report import CheckReport
from zograd.diagnostics.run import check

__all__ = [
    "Autograd",
    "Calls",
    "CheckReport",
    "DistributionReport",
    "Finding",
    "Need",
    "Noise",
    "Pickling",
    "Radius",
    "Suggestion",
    "Vectorized",
    "check",
    "check_distribution",
]


def __dir__() -> list[str]:
    return list(__all__)
