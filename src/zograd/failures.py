"""What a failed evaluation means: it raises, is tried again, or leaves its direction out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from zograd._base import checks
from zograd.errors import (
    BudgetExceeded,
    DeterminismError,
    JournalError,
    RankError,
    ReplayError,
    SecondDerivativeError,
    SharedStreamError,
    WorkerError,
)

__all__ = ["Drop", "Failures", "Retry", "is_failure"]


def __dir__() -> list[str]:
    return list(__all__)


@dataclass(frozen=True)
class Drop:
    r"""Leave out the directions of which an evaluation failed: the mean is over the M survivors.

    .. math:: \hat g = \frac{1}{M \sigma} \sum_{i \,\mathrm{survived}} a_i \epsilon_i

    The coefficient :math:`a_i` is what the scheme makes of a direction's values. An evaluation fails if ``fn`` raises
    or returns a value that is not finite. The whole direction goes, with all its sides, since half of a difference is
    no difference. Each estimate that left something out warns.

    If it is chance that fails an evaluation (a network, a license server), the mean of the estimate is what it was and
    its variance N / M times as large. If failure depends on the point, the mean is that over directions that survive,
    which is another function's gradient: near a region where ``fn`` fails, the estimate does not see what lies there.
    A finite penalty in place of the failure, or :class:`Retry`, has no such bias.

    The value at the parameters themselves cannot be left out: if that evaluation fails, the estimate raises.

    Args:
        min_success: the least fraction of directions that must survive, above 0 and at most 1; the estimate raises
            once fewer can.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of its range.

    Examples:
        >>> import torch, warnings, zograd
        >>> @zograd.zero_order(num_samples=100, seed=0, failures=zograd.failures.Drop(min_success=0.1))
        ... def fn(x):
        ...     return x.sum().log()  # not a number for negative sums
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     estimate = fn.estimate(torch.ones(2))
        >>> estimate.failures == (estimate.coefficients == 0).sum(), len(caught)
        (tensor(True), 1)
        >>> estimate.grad.isfinite()
        tensor([True, True])
    """

    min_success: float = 0.5

    def __post_init__(self) -> None:
        least = checks.number(self.min_success, "`Drop(min_success=...)`", checks.FRACTION)
        object.__setattr__(self, "min_success", least)


@dataclass(frozen=True)
class Retry:
    """Evaluate the same point again where ``fn`` raised or returned a value that is not finite.

    It is the same point and the same random state: a new direction in place of the one that failed would favor the
    directions that succeed. So this is for failures that have nothing to do with the point, or with its random numbers.

    Args:
        times: how often a point is evaluated again, at least 1.
        then: what it means if the last try fails too: ``"raise"``, or a :class:`Drop`.

    Raises:
        TypeError: if a setting is of a wrong type.
        ValueError: if one is out of its range.

    Examples:
        >>> import torch, zograd
        >>> calls = []
        >>> @zograd.zero_order(num_samples=4, failures=zograd.failures.Retry(2))
        ... def fn(x):
        ...     calls.append(x)
        ...     if len(calls) == 3:
        ...         raise ConnectionError("busy")
        ...     return x.sum()
        >>> estimate = fn.estimate(torch.ones(2))
        >>> estimate.evaluations, estimate.failures
        (6, 1)
    """

    times: int = 3
    then: Drop | str = "raise"

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", checks.integer(self.times, "`Retry(times=...)`", least=1))
        then: Any = self.then
        if isinstance(then, Drop) or then == "raise":
            return
        if isinstance(then, str):
            raise ValueError(f"`Retry(then=...)` must be 'raise' or a Drop, got {then!r}.")
        got = "the class: add `()`" if then is Drop else f"{type(then).__name__} {then!r:.80}"
        raise TypeError(f"`Retry(then=...)` must be 'raise' or a Drop, got {got}.")


Failures: TypeAlias = "str | Retry | Drop"
"""What ``failures=`` accepts, which is ``"raise"``, a :class:`Retry` or a :class:`Drop`."""

# A policy is about fn. These say that the estimate itself cannot be what was asked for.
_BEYOND = (
    BudgetExceeded,
    DeterminismError,
    JournalError,
    RankError,
    ReplayError,
    SecondDerivativeError,
    SharedStreamError,
    WorkerError,
)


def is_failure(error: BaseException) -> bool:
    """Whether an exception of ``fn`` is a failed evaluation, which a policy may deal with.

    Args:
        error: what was raised.

    Returns:
        False for what ends a program, and for errors that say that the estimate cannot be what was asked for.
    """
    return isinstance(error, Exception) and not isinstance(error, _BEYOND)


@dataclass(frozen=True)
class Policy:
    """What ``failures=`` comes down to.

    Attributes:
        tries: how often one point may be evaluated.
        drop: what is to be done about points that failed for good, if they may be left out.
    """

    tries: int = 1
    drop: Drop | None = None

    @classmethod
    def of(cls, failures: Failures) -> Policy:
        """Return the policy that a setting means."""
        last: Any = failures.then if isinstance(failures, Retry) else failures
        times = failures.times if isinstance(failures, Retry) else 0
        return cls(1 + times, last if isinstance(last, Drop) else None)


RAISE = Policy()
