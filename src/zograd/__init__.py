"""zograd: zeroth-order differentiation in PyTorch.

Gradients of functions that have none to give (simulators, metrics, discrete choices, inner training loops) from their
values alone, so that ``loss.backward()`` and every optimizer of PyTorch work as usual.
"""

from zograd import diagnostics, distributions, evaluators, failures, nn, optim, schemes, shaping, unrolled
from zograd._base.streams import current_seed, current_seeds
from zograd._base.versions import __version__, show_versions
from zograd.diagnostics import CheckReport, check
from zograd.errors import (
    BudgetExceeded,
    DeterminismError,
    EvaluationError,
    EvaluationTimeout,
    JournalError,
    NonFiniteError,
    RankError,
    ReplayError,
    SecondDerivativeError,
    SharedStreamError,
    WorkerError,
    ZeroOrderWarning,
)
from zograd.estimate.result import Estimate
from zograd.func.decorator import zero_order
from zograd.func.function import ZeroOrderFunction
from zograd.func.options import Options
from zograd.func.slices import SliceCheck, check_slices
from zograd.optim import replay
from zograd.sampling import Until
from zograd.schemes import ANTITHETIC, FORWARD, FOURTH_ORDER, NAIVE, Scheme
from zograd.tracking import TrackedEstimate, Tracker

__all__ = [  # noqa: RUF022 - grouped as the reader meets them
    # the front door
    "zero_order",
    "nn",
    "optim",
    "replay",
    "check",
    "unrolled",
    "check_slices",
    "diagnostics",
    "current_seed",
    "current_seeds",
    "Tracker",
    # the axes
    "distributions",
    "evaluators",
    "failures",
    "schemes",
    "shaping",
    "ANTITHETIC",
    "FORWARD",
    "FOURTH_ORDER",
    "NAIVE",
    "Scheme",
    "Until",
    # what comes back
    "CheckReport",
    "Estimate",
    "Options",
    "SliceCheck",
    "TrackedEstimate",
    "ZeroOrderFunction",
    # what goes wrong
    "BudgetExceeded",
    "DeterminismError",
    "EvaluationError",
    "EvaluationTimeout",
    "JournalError",
    "NonFiniteError",
    "RankError",
    "ReplayError",
    "SecondDerivativeError",
    "SharedStreamError",
    "WorkerError",
    "ZeroOrderWarning",
    # about the package
    "__version__",
    "show_versions",
]


def __dir__() -> list[str]:
    return list(__all__)
