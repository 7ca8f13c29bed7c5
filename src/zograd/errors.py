"""What zograd raises and warns beyond `ValueError` for values and `TypeError` for types."""

from __future__ import annotations

__all__ = [
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
]


class ZeroOrderWarning(UserWarning):
    """The category of every warning that zograd emits, so that one filter addresses them all."""


class NonFiniteError(ValueError):
    """A value of ``fn`` was nan or infinite; a gradient made from it would be wrong without a sign of it."""


class ReplayError(RuntimeError):
    """Directions were asked for again, but the user's ``sample`` does not give the same ones twice."""


class SecondDerivativeError(NotImplementedError):
    """A second derivative was asked for of an estimate that has none to give."""


class SharedStreamError(RuntimeError):
    """``fn`` drew from torch's global random stream while another thread's estimate owned it."""


class BudgetExceeded(RuntimeError):
    """The next estimate would take more evaluations than a :class:`zograd.Tracker` has left; it was not begun."""


class JournalError(RuntimeError):
    """A journal is of another run, another program or another version, or is damaged."""


class RankError(RuntimeError):
    """Ranks of torch.distributed have no estimate in common: one failed, died, or disagrees with the others."""


class EvaluationError(RuntimeError):
    """``fn`` raised at a point of an estimate; what it raised is the cause.

    What it raises at the parameters themselves, as any call of it would, goes up as it is, and so does what it raises
    in a call for many points under ``evaluator="vmap"``.
    """


class EvaluationTimeout(EvaluationError):
    """An evaluation took longer than :class:`zograd.evaluators.Pool` allows, and was given up."""


class WorkerError(RuntimeError):
    """A worker of :class:`zograd.evaluators.Pool` died, or something could not be sent to it or come back."""


class DeterminismError(RuntimeError):
    """A worker makes other directions or points from the same seed, so its values belong to another estimate."""
