"""How far a setup can be trusted: a function and its settings, a distribution of directions.

Nothing here is needed for a gradient; it tells how good one is.
"""

from zograd._check.advice import Need, Suggestion
from zograd._check.distribution import DistributionReport, Finding, check_distribution
from zograd._check.probes import Calls, Noise, Pickling, Vectorized
from zograd._check.radii import Radius
from zograd._check.report import Autograd, CheckReport
from zograd._check.run import check

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
