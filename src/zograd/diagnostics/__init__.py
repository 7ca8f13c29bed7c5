"""How far a setup can be trusted: a function and its settings, a distribution of directions.

Nothing here is needed for a gradient; it tells how good one is.
"""

from zograd.diagnostics.distribution.check import check_distribution
from zograd.diagnostics.distribution.report import DistributionReport, Finding
from zograd.diagnostics.function.advice import Need, Suggestion
from zograd.diagnostics.function.autograd import Autograd
from zograd.diagnostics.function.probes import Calls, Noise, Pickling
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
