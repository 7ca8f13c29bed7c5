"""What estimates cost: exact counts, a budget, a progress bar, a callback."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zograd._base import checks
from zograd.errors import BudgetExceeded

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Token
    from types import TracebackType

__all__ = ["RunningEstimate", "TrackedEstimate", "Tracker"]

_active: ContextVar[tuple[Tracker, ...]] = ContextVar("zograd_trackers", default=())
_running: ContextVar[bool] = ContextVar("zograd_estimating", default=False)


@dataclass(frozen=True)
class TrackedEstimate:
    """One estimate as a :class:`Tracker` saw it.

    Attributes:
        index: how many estimates the tracker had seen before.
        fn: the name of the function.
        value: ``fn`` at the parameters; None if it returns several values. Of a step of MeZO the mean of its values.
        gradient_norm: the Euclidean norm of the estimated gradient; None where the estimate makes none: if ``fn``
            returns several values, and for MeZO.
        evaluations: evaluations of ``fn``, retries included.
        retries: those that were done again since they had failed.
        failures: those that failed, and were dealt with by a policy.
        seconds: from its beginning to its end.
        seed: what its directions are a function of.
    """

    index: int
    fn: str
    value: float | None
    gradient_norm: float | None
    evaluations: int
    retries: int
    failures: int
    seconds: float
    seed: int


class Tracker:
    """Counts what the estimates inside a ``with`` block cost, and stops before a budget is passed.

    It sees every estimate that begins in the thread that entered it: of decorated functions, of modules and of
    :class:`zograd.optim.MeZO`. In other threads it sees those that run in a copy of the context
    (``contextvars.copy_context().run``, ``asyncio.to_thread``), or that enter the same tracker themselves. Trackers
    nest, and each counts; so do estimates inside ``fn`` of another estimate, each for itself.

    Every call of ``fn`` that an estimate makes counts when it begins, those of an estimate that raises in the end
    included. Values that a :class:`~zograd.evaluators.Journal` remembers cost nothing. Plain calls (under
    ``torch.no_grad()``, or with nothing that requires grad) are no estimates and are not counted.

    Args:
        budget: the most evaluations; None for no limit. An estimate that would pass it raises before it begins, since a
            part of one is wasted. Retries and repeats, which nobody can plan, are counted but not foreseen.
        progress: whether to show a bar over evaluations, with their rate and the failures.
        callback: called with a :class:`TrackedEstimate` after each estimate, in its thread.

    Attributes:
        evaluations: points at which ``fn`` was evaluated, retries included.
        retries: those that were done again since they had failed.
        failures: those that failed and were dealt with by a policy.
        estimates: estimates that came to their end.
        seconds: spent in estimates, those of several threads added up.
        history: one dict for each estimate, the fields of :class:`TrackedEstimate`: ``pandas.DataFrame(t.history)``.

    Raises:
        TypeError: if a setting is of a wrong type.
        ValueError: if the budget is negative.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(method="antithetic", num_samples=10)
        ... def loss(x):
        ...     return x.square().sum()
        >>> x = torch.ones(3, requires_grad=True)
        >>> with zograd.Tracker(budget=50) as t:
        ...     for _ in range(5):
        ...         loss(x).backward()
        Traceback (most recent call last):
        zograd.errors.BudgetExceeded: `Tracker(budget=50)`: the next estimate of `loss` takes 21 evaluations, ...
        >>> t.evaluations, t.estimates, t.history[0]["value"]
        (42, 2, 3.0)
    """

    def __init__(
        self,
        budget: int | None = None,
        progress: bool = False,
        callback: Callable[[TrackedEstimate], Any] | None = None,
    ) -> None:
        checks.boolean(progress, "`Tracker(progress=...)`")
        checks.function(callback, "`Tracker(callback=...)`", none=True)
        self.budget: int | None = checks.integer(budget, "`Tracker(budget=...)`", least=0, none=True)
        self.evaluations: int = 0
        self.retries: int = 0
        self.failures: int = 0
        self.estimates: int = 0
        self.seconds: float = 0.0
        self.history: list[dict[str, Any]] = []
        self._progress, self._callback = progress, callback
        self._planned = 0  # evaluations that running estimates have still to make
        self._entered = 0
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Tracker:
        with self._lock:
            self._entered += 1
            if self._progress and self._bar is None:
                from tqdm.auto import tqdm

                self._bar = tqdm(total=self.budget, initial=self.evaluations, unit=" evaluations")
        _active.set((*_active.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        trackers = list(_active.get())
        del trackers[len(trackers) - 1 - trackers[::-1].index(self)]
        _active.set(tuple(trackers))
        with self._lock:
            self._entered -= 1
            if self._bar is not None and not self._entered:
                self._bar.close()
                self._bar = None

    def __repr__(self) -> str:
        return (
            f"Tracker(budget={self.budget}, evaluations={self.evaluations}, retries={self.retries}, "
            f"failures={self.failures}, estimates={self.estimates}, seconds={self.seconds:.3g})"
        )

    def _plan(self, evaluations: int, fn: str) -> None:
        with self._lock:
            left = None if self.budget is None else self.budget - self.evaluations - self._planned
            if left is not None and evaluations > left:
                raise BudgetExceeded(
                    f"`Tracker(budget={self.budget})`: the next estimate of {fn} takes {evaluations} evaluations, and "
                    f"{max(left, 0)} are left; {self.evaluations} were made. It was not begun."
                )
            self._planned += evaluations

    def _count(self, evaluations: int, retries: int, failures: int, planned: int) -> None:
        with self._lock:
            self.evaluations += evaluations
            self.retries += retries
            self.failures += failures
            self._planned -= planned
            if self._bar is not None:
                if failures:
                    self._bar.set_postfix(failures=self.failures, refresh=False)
                self._bar.update(evaluations)

    def _end(self, seconds: float, estimate: TrackedEstimate | None) -> None:
        with self._lock:
            self.seconds += seconds
            if estimate is None:
                return
            row = {**vars(estimate), "index": self.estimates}
            self.estimates += 1
            self.history.append(row)
        if self._callback is not None:  # without the lock: it may start an estimate itself
            self._callback(TrackedEstimate(**row))


trackers: Callable[[], tuple[Tracker, ...]] = _active.get
"""The trackers that see what runs here."""


class RunningEstimate:
    """One estimate, as it runs, on behalf of the trackers that see it.

    Args:
        fn: the name of its function.
        planned: evaluations that it takes if nothing has to be repeated.
    """

    def __init__(self, fn: str, planned: int) -> None:
        self.trackers: tuple[Tracker, ...] = tuple(dict.fromkeys(_active.get()))
        self._fn, self._planned = fn, planned
        self._counts = [0, 0, 0]
        self._lock = threading.Lock()
        self._begun = 0.0
        self._nested = True
        self._token: Token[bool] | None = None
        self._result: TrackedEstimate | None = None

    def __enter__(self) -> RunningEstimate:
        if not self.trackers:
            return self
        for i, tracker in enumerate(self.trackers):
            try:
                tracker._plan(self._planned, self._fn)
            except BudgetExceeded:
                for earlier in self.trackers[:i]:
                    earlier._count(0, 0, 0, self._planned)
                raise
        self._nested = _running.get()
        self._token = _running.set(True)
        self._begun = time.perf_counter()
        return self

    def count(self, evaluations: int = 1, retries: int = 0, failures: int = 0) -> None:
        """Say that ``fn`` was evaluated, or failed."""
        with self._lock:  # an evaluator's workers may be threads
            for i, more in enumerate((evaluations, retries, failures)):
                self._counts[i] += more
            planned = min(max(evaluations, 0), self._planned)
            self._planned -= planned
        for tracker in self.trackers:
            tracker._count(evaluations, retries, failures, planned)

    def finish(
        self,
        seed: int,
        value: float | None,
        norm: float | None = None,
        *,
        evaluations: int | None = None,
        failures: int | None = None,
    ) -> None:
        """The estimate is done; totals are what it reports, where its evaluator counted less as it went."""
        totals = [evaluations, None, failures]
        missing = [0 if now is None else now - c for now, c in zip(totals, self._counts, strict=True)]
        if any(missing):
            self.count(*missing)
        seconds = time.perf_counter() - self._begun
        evaluated, retries, failed = self._counts
        name = self._fn.strip("`")
        self._result = TrackedEstimate(0, name, value, norm, evaluated, retries, failed, seconds, seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is None:
            return
        _running.reset(self._token)
        seconds = 0.0 if self._nested else time.perf_counter() - self._begun
        for tracker in self.trackers:
            tracker._count(0, 0, 0, self._planned)
        for tracker in self.trackers:
            tracker._end(seconds, self._result)
