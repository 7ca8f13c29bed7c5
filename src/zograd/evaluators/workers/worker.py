"""The other side of :class:`zograd.evaluators.Pool`: what runs in its workers."""

from __future__ import annotations

import os
import pickle
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zograd.errors import WorkerError
from zograd.evaluators.task.answer import Answer, Facts, Report
from zograd.evaluators.task.elsewhere import worker_name
from zograd.evaluators.workers.process import settle
from zograd.evaluators.workers.shipping import pack

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable

    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points

_REMEMBERED = 2  # jobs whose parameters a process keeps


@dataclass(eq=False)
class Job:
    """The function and the points that the tasks of one estimate have in common; sent to each worker once.

    Attributes:
        fn: the objective.
        points: where.
        threads: threads that torch uses in a worker process; None leaves that to torch.
        owned: whether the worker processes are the pool's own.
        key: what tasks call it by.
        home: the process that made it.
        context: for threads of that process.
        points_of: those of each thread.
    """

    fn: Objective
    points: Points
    threads: int | None
    owned: bool
    key: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    home: int = field(default_factory=os.getpid)
    context: contextvars.Context | None = None
    points_of: dict[int, Points] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "points_of": {}, "context": None}

    def of_this_thread(self) -> tuple[Objective, Points]:
        """Return function and points that no other thread uses."""
        thread = threading.get_ident()
        if thread not in self.points_of:
            self.points_of[thread] = self.points.copy()
        return self.fn.of_thread(), self.points_of[thread]


at_home: dict[bytes, Job] = {}
"""The jobs of this process, which its threads find without being sent anything."""

_received: OrderedDict[bytes, Job] = OrderedDict()


class PickledJob:
    """A job on its way: itself within a process, pickled once for all others.

    Args:
        job: the job.
        ways: says whether functions are pickled by value, in the order to try; the executor may yet have to be made.
    """

    def __init__(self, job: Job, ways: Callable[[], tuple[bool, ...]]) -> None:
        self._job: Job | None = job
        self._ways = ways
        self._data: bytes | None = None
        self.error: Exception | None = None  # why it does not pickle, whatever the executor makes of that
        self.sent: int = 0  # times that it was sent along with a task, to this executor

    def __reduce__(self) -> tuple[Any, ...]:
        if self._data is None:
            self._data = self._packed()
        return _arrived, (self._data,)

    def _packed(self) -> bytes:
        first: Exception | None = None
        for by_value in self._ways():
            try:
                return pack(self._job, by_value=by_value)
            except Exception as error:
                first = first or error
        self.error = first
        raise pickle.PicklingError(f"not to be pickled: {first!r:.200}")

    def open(self) -> Job:
        """Return the job."""
        if self._job is None:
            assert self._data is not None
            self._job = pickle.loads(self._data)
        return self._job


def _arrived(data: bytes) -> PickledJob:
    pickled = PickledJob.__new__(PickledJob)
    pickled._job, pickled._data, pickled.error = None, data, None
    return pickled


class Task(NamedTuple):
    """The points of directions ``lo`` to ``hi`` at some offsets; the center if there is none."""

    key: bytes  # of the job
    serial: int  # an executor that knows answers by their questions must not know this one
    lo: int
    hi: int
    offsets: tuple[float, ...]
    shape: tuple[int, ...]  # of a value; the center tells it
    facts: Facts  # about fn, as far as they are known


class Reply(NamedTuple):
    """An answer and the worker that gave it; no answer if that worker lacks the job."""

    worker: str
    answer: Answer | None


def work(task: Task, pickled: PickledJob | None) -> Reply:
    """Do a task, or say that the job is missing.

    Args:
        task: which points of which job.
        pickled: the job, if it was sent along.

    Returns:
        The reply.
    """
    home = at_home.get(task.key)
    if home is not None and home.home == os.getpid():
        return Reply(
            worker_name(), home.context.copy().run(_answer, home, task) if home.context else _answer(home, task)
        )
    try:
        job = _received.get(task.key) or _receive(task.key, pickled)
        return Reply(worker_name(), None if job is None else _answer(job, task))
    except Exception as error:
        unread = WorkerError(f"a worker cannot read what it was sent: {error!r:.300}")
        unread.__cause__ = error
        return Reply(worker_name(), Answer(torch.empty(0, dtype=torch.float64), Report(worker=worker_name()), unread))


def _answer(job: Job, task: Task) -> Answer:
    objective, points = job.of_this_thread()
    objective.shape, objective.facts = torch.Size(task.shape), task.facts
    if not task.offsets:
        return objective.center(points)
    return objective.evaluate(points.only(task.offsets), task.lo, task.hi)


def _receive(key: bytes, pickled: PickledJob | None) -> Job | None:
    if pickled is None:
        return None
    job = _received[key] = pickled.open()
    while len(_received) > _REMEMBERED:
        _received.popitem(last=False)
    if job.threads is not None and torch.get_num_threads() != job.threads:
        torch.set_num_threads(job.threads)
    if job.owned:
        settle()
    return job
