"""zograd: zeroth-order differentiation in PyTorch.

Gradients of functions that have none to give (simulators, metrics, discrete choices, inner training loops) from their
values alone, so that ``loss.backward()`` and every optimizer of PyTorch work as usual.
"""

from importlib.metadata import PackageNotFoundError, version

from zograd import distributions, evaluators, schemes, shaping
from zograd._random import current_seed, current_seeds
from zograd.decorator import ZeroOrderFunction, zero_order
from zograd.errors import NonFiniteError, ReplayError, SecondDerivativeError, SharedStreamError, ZeroOrderWarning
from zograd.estimator import Estimate
from zograd.schemes import ANTITHETIC, FORWARD, FOURTH_ORDER, NAIVE, Scheme

try:
    __version__ = version("zograd")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "ANTITHETIC",
    "FORWARD",
    "FOURTH_ORDER",
    "NAIVE",
    "Estimate",
    "NonFiniteError",
    "ReplayError",
    "Scheme",
    "SecondDerivativeError",
    "SharedStreamError",
    "ZeroOrderFunction",
    "ZeroOrderWarning",
    "__version__",
    "current_seed",
    "current_seeds",
    "distributions",
    "evaluators",
    "schemes",
    "shaping",
    "zero_order",
]
