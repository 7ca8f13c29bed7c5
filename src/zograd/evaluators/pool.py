"""Points evaluated by the workers of an executor: threads, processes, machines."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from zograd._base import checks
from zograd._base.execution import cores
from zograd.errors import ReplayError
from zograd.evaluators.base import Evaluator
from zograd.evaluators.workers.dispatch import Dispatch
from zograd.evaluators.workers.executor import Workers, spawned
from zograd.evaluators.workers.worker import Job, PickledJob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from weakref import WeakKeyDictionary

    from zograd.evaluators.task.answer import Answer
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points


class Pool(Evaluator):
    """Evaluate points in the workers of an executor, in any order; the gradient is that of :class:`Loop`, bit for bit.

    It takes any ``concurrent.futures.Executor``: threads, processes, loky, ``client.get_executor()`` of dask, mpi4py's.
    Tasks are numbers of points; directions are made by the workers from the seed, and what ``fn`` needs goes to each
    worker once an estimate. A worker proves with its first answer that it makes the same directions with the same
    torch. Threads get copies of the modules that ``fn`` uses. At most two tasks a worker are under way at a time.

    ``fn`` goes to processes by its name, decorated or not, so it stands at the top of a module that they can import;
    with cloudpickle installed (loky and dask bring it) lambdas and functions of the main script go, too. A module's
    center is evaluated in this process, for the traces that it leaves.

    If a worker dies, a standard executor is broken for good. Give a function that makes the executor instead: then the
    pool makes it when needed and anew when it breaks, evaluates again what was under way, and ends it in the end. A
    point at which workers die three times with nothing else under way counts as failed, and so does one that takes
    longer than ``timeout``; ``failures=`` of :func:`zograd.zero_order` says what that means.

    Args:
        executor: an executor, which stays the caller's; or a function that makes one, which is the pool's. None makes
            a pool of spawned processes: a script needs its code under ``if __name__ == "__main__":`` for that.
        batch_size: points in a task: more where an evaluation takes less than some milliseconds.
        timeout: seconds that an evaluation may take, with the retries of ``failures=`` that its worker makes at once;
            None for no limit. Processes of the pool's own are ended then and made anew. Those of others, and threads,
            cannot be ended: they are left to themselves.
        workers: how many workers there are, where the executor does not say so; with no executor, how many to start
            (None: as many as there are cores).
        threads: threads that torch uses in each worker process; None leaves that to torch.

    Raises:
        TypeError: if a setting is of a wrong type.
        ValueError: if one is out of its range.
        WorkerError: of an estimate, if a worker dies for good, or ``fn`` or a value cannot be sent.
        DeterminismError: of an estimate, if a worker has another torch or makes other points.
        EvaluationTimeout: of an estimate, if an evaluation takes longer than ``timeout``.
        ReplayError: of an estimate, if the distribution's directions cannot be made again.

    Examples:
        >>> import torch, zograd
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> def simulate(x):
        ...     return float(x.round().sum())
        >>> with ThreadPoolExecutor(4) as threads:
        ...     pool = zograd.evaluators.Pool(threads)
        ...     fn = zograd.zero_order(num_samples=10, seed=0, evaluator=pool)(simulate)
        ...     together = fn.estimate(torch.ones(3)).grad
        >>> torch.equal(together, fn.replace(evaluator="loop").estimate(torch.ones(3)).grad)
        True
    """

    def __init__(
        self,
        executor: Executor | Callable[[], Executor] | None = None,
        batch_size: int = 1,
        timeout: float | None = None,
        *,
        workers: int | None = None,
        threads: int | None = 1,
    ) -> None:
        workers = checks.integer(workers, "`Pool(workers=...)`", least=1, none=True)
        made = not isinstance(executor, type) and callable(getattr(executor, "submit", None))
        if executor is not None and not made and not callable(executor):
            raise TypeError(
                "`Pool(executor=...)` must be an Executor, a function that makes one, or None, got "
                f"{type(executor).__name__} {executor!r:.80}.{_meant(executor)}"
            )
        self.batch_size: int = checks.integer(batch_size, "`Pool(batch_size=...)`", least=1)
        self.timeout: float | None = checks.number(timeout, "`Pool(timeout=...)`", checks.POSITIVE_FINITE, none=True)
        self.threads: int | None = checks.integer(threads, "`Pool(threads=...)`", least=1, none=True)
        if executor is None:
            workers = workers or cores()
            executor = functools.partial(spawned, workers)
        self._workers = Workers(executor, None, workers) if made else Workers(None, executor, workers)  # type: ignore[arg-type]

    def center(self, fn: Objective, points: Points) -> Answer:
        """Evaluate the parameters in a worker; here, if that leaves traces."""
        if fn.module is not None:
            return super().center(fn, points)
        with self._dispatch(fn, points) as dispatch:
            return dispatch.center()

    def values(self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None) -> Iterator[Answer]:
        """Yield directions in order, as soon as they and all before them are there."""
        hi = len(points.directions) if hi is None else hi
        if lo < hi:
            with self._dispatch(fn, points) as dispatch:
                yield from dispatch.directions(lo, hi)

    @contextlib.contextmanager
    def _dispatch(self, fn: Objective, points: Points) -> Iterator[Dispatch]:
        if not points.directions.replayable:
            raise ReplayError(
                f"`Pool`: the directions of {points.directions.distribution} cannot be made again by the workers: its "
                "`sample` gave two answers for one state of torch's random stream. Draw from torch's random functions."
            )
        dispatch = Dispatch(self._workers, self._job(fn, points), fn, points, self.batch_size, self.timeout)
        with self._workers.turn(), dispatch:
            yield dispatch

    def _job(self, fn: Objective, points: Points) -> PickledJob:
        """Return what workers get to know of an estimate; the same where a journal asks span by span."""
        jobs: WeakKeyDictionary[Objective, PickledJob] = self._workers.jobs
        if fn not in jobs:
            own = fn.for_thread(fn.fn, fn.arguments)
            job = Job(own, points, self.threads, self._workers.owned, context=contextvars.copy_context())
            jobs[fn] = PickledJob(job, self._workers.ways)
        return jobs[fn]

    def close(self) -> None:
        """End the pool's own executor, whatever it is doing; the next estimate makes a new one."""
        self._workers.end()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        settings = f"batch_size={self.batch_size}, timeout={self.timeout}, threads={self.threads}"
        return f"Pool({self._workers!r}, {settings})"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        return self  # a copy of a module works with the same workers


def _meant(executor: Any) -> str:
    count = isinstance(executor, int) and not isinstance(executor, bool) and executor > 0
    return f" For that many processes write `Pool(workers={executor})`." if count else ""
