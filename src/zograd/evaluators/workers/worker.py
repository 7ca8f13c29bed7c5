"""The other side of :class:`zograd.evaluators.Pool`: what runs in its workers."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zograd._base.buffers import to_bytes
from zograd._base.digest import Digest
from zograd._base.streams import FnStream
from zograd.distributions.directions import Directions
from zograd.errors import WorkerError
from zograd.evaluators.objective import Habits, Objective
from zograd.evaluators.points import Points
from zograd.evaluators.workers.copies import private
from zograd.evaluators.workers.shipping import pack, packed_error

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable, Iterator

    from zograd._base.trees import Arguments, Leaves, Space
    from zograd.distributions.base import Distribution
    from zograd.evaluators.objective import Value
    from zograd.failures import Failures

CENTER_POINT = -1
_REMEMBERED = 2  # jobs whose parameters a process keeps


@dataclass(frozen=True)
class Modes:
    """What of the caller's surroundings counts for what torch computes."""

    dtype: torch.dtype
    device: torch.device
    autocast: tuple[tuple[str, torch.dtype], ...]
    threads: int | None

    @classmethod
    def here(cls, device: torch.device, threads: int | None) -> Modes:
        """Those of this thread."""
        kinds = [kind for kind in {"cpu", device.type} if torch.is_autocast_enabled(kind)]
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(torch.get_default_dtype(), torch.get_default_device(), autocast, threads)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let them hold in this thread."""
        if torch.get_default_dtype() != self.dtype:  # of the process: only in another one
            torch.set_default_dtype(self.dtype)
        with contextlib.ExitStack() as stack:
            if torch.get_default_device() != self.device:
                stack.enter_context(self.device)
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            stack.enter_context(torch.enable_grad())
            yield


@dataclass(eq=False)
class Job:
    """All that the evaluations of one estimate have in common; sent to each worker once."""

    fn: Callable[..., Any]
    arguments: Arguments
    params: Leaves
    policy: Failures
    distribution: Distribution
    space: Space
    seed: int
    num: int
    sigma: tuple[float, ...]
    probe: float  # the offset of the point that workers prove themselves by
    shared: bool
    depth: int
    modes: Modes
    owned: bool  # whether its worker processes are the pool's own
    kind: type[Points] = Points
    key: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    home: int = field(default_factory=os.getpid)
    context: contextvars.Context | None = None  # for threads of this process
    places: dict[int, Place] = field(default_factory=dict)  # of each thread

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "places": {}, "context": None}

    @property
    def points(self) -> Points:
        """The points, with buffers of their own."""
        directions = Directions(self.distribution, self.space, self.seed, self.num)
        return self.kind.again(self.params, directions, self.sigma, (self.probe,))


at_home: dict[bytes, Job] = {}
"""The jobs of this process, which its threads find without being sent anything."""

_received: OrderedDict[bytes, Job] = OrderedDict()


class Parcel:
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
        """The job."""
        if self._job is None:
            assert self._data is not None
            self._job = pickle.loads(self._data)
        return self._job


def _arrived(data: bytes) -> Parcel:
    parcel = Parcel.__new__(Parcel)
    parcel._job, parcel._data, parcel.error = None, data, None
    return parcel


class Task(NamedTuple):
    """Points ``lo`` to ``hi``, numbered by direction and side; the center has a number of its own."""

    key: bytes  # of the job
    serial: int  # an executor that knows answers by their questions must not know this one
    lo: int
    hi: int
    sides: tuple[float, ...]
    shape: tuple[int, ...]  # of a value; the center tells it
    habits: tuple[bool, bool]  # of fn, as far as they are known


@dataclass
class Answer:
    """What comes back of a task: values, or why there are none."""

    worker: str
    missing: bool = False
    data: bytes = b""  # float64, 8 bytes a value
    shape: tuple[int, ...] = ()
    dtype: str = ""  # of the center's value
    counts: tuple[int, int, int] = (0, 0, 0)
    habits: tuple[bool, bool] = (False, False)
    proof: tuple[bytes, str] | None = None  # with the first answer
    error: Any = None


class Place:
    """A job in one thread: function, arguments and buffers of its own."""

    def __init__(self, job: Job) -> None:
        fn, leaves = job.fn, job.arguments.leaves
        if threading.current_thread() is not threading.main_thread():
            fn, leaves = private(fn, leaves)
        self.job = job
        self.objective: Objective = Objective(
            fn, replace(job.arguments, leaves=leaves), job.params, Habits(), job.policy
        )
        self.objective.counted = self._count
        self.points: Points = job.points
        self.proven: bool = False
        self._counts = [0, 0, 0]

    def _count(self, evaluations: int, retries: int, failures: int) -> None:
        for i, more in enumerate((evaluations, retries, failures)):
            self._counts[i] += more

    def answer(self, task: Task) -> Answer:
        """Evaluate points, or the center."""
        objective, job = self.objective, self.job
        objective.shape, objective.habits = torch.Size(task.shape), Habits(*task.habits)
        answer = Answer(_name())
        self._counts = [0, 0, 0]
        values: list[Value] = []
        try:
            # First, since the directions of a worker that makes others are not worth an evaluation.
            if not self.proven:
                answer.proof = fingerprint(self.points), torch.__version__
                self.proven = True
            with job.modes.entered(), FnStream(job.seed, job.space.device, shared=job.shared) as stream:
                stream.depth = job.depth
                objective.stream = stream
                if task.lo == CENTER_POINT:
                    values.append(objective.center(self.points.center()))
                    answer.dtype = str(objective.value.dtype).removeprefix("torch.")
                    answer.shape = tuple(objective.shape)
                else:
                    values.extend(self._values(task.sides, task.lo, task.hi))
        except SystemExit as error:
            answer.error = WorkerError(f"{objective.name} called `sys.exit({error.code!r})` in a worker.")
            answer.error.__cause__ = error
        except Exception as error:
            answer.error = error
        finally:
            objective.stream = None
        answer.data = b"".join(map(to_bytes, values))
        answer.counts = self._counts[0], self._counts[1], self._counts[2]
        answer.habits = objective.habits.differentiates, objective.habits.draws
        return answer

    def _values(self, sides: tuple[float, ...], lo: int, hi: int) -> Iterator[Value]:
        count = len(sides)
        points = self.points.only(sides)
        self.points = points  # with the span of directions that it made last
        for i in range(lo // count, -(-hi // count)):
            (point,) = points.rows(i, i + 1)
            for j in range(max(lo - i * count, 0), min(hi - i * count, count)):
                yield self.objective(point(sides[j]), i)


def fingerprint(points: Points) -> bytes:
    """A digest of the first point of direction 0: of parameters and directions."""
    (first,) = points.rows(0, 1)
    return Digest().add([leaf.detach() for leaf in first(points.sides[0])]).result()


def work(task: Task, parcel: Parcel | None) -> Answer:
    """What a worker does: evaluate points, or say that the job is missing.

    Args:
        task: which points of which job.
        parcel: the job, if it was sent along.

    Returns:
        The answer.
    """
    home = at_home.get(task.key)
    if home is not None and home.home == os.getpid():
        return home.context.copy().run(_answer, home, task) if home.context else _answer(home, task)
    try:
        job = _received.get(task.key) or _receive(task.key, parcel)
        answer = Answer(_name(), missing=True) if job is None else _answer(job, task)
    except Exception as error:
        answer = Answer(_name(), error=WorkerError(f"a worker cannot read what it was sent: {error!r:.300}"))
        answer.error.__cause__ = error
    if answer.error is not None:
        answer.error = packed_error(answer.error)
    return answer


def _answer(job: Job, task: Task) -> Answer:
    place = job.places.get(threading.get_ident())
    if place is None:
        place = job.places[threading.get_ident()] = Place(job)
    return place.answer(task)


def _receive(key: bytes, parcel: Parcel | None) -> Job | None:
    if parcel is None:
        return None
    job = _received[key] = parcel.open()
    while len(_received) > _REMEMBERED:
        _received.popitem(last=False)
    if job.modes.threads is not None and torch.get_num_threads() != job.modes.threads:
        torch.set_num_threads(job.modes.threads)
    if job.owned:
        settle()
    return job


_settled: list[int] = []  # the process that did; a fork has not


def settle() -> None:
    """What a worker process of the pool's own does once: go with its parent, and be the head of its own children."""
    if _settled == [os.getpid()]:
        return
    _settled[:] = [os.getpid()]
    _own_group()
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None or hasattr(os, "getppid"):
        threading.Thread(target=_go_with, args=(parent,), name="zograd-parent", daemon=True).start()


def _own_group() -> None:
    """A process group of its own, so that ending it ends the simulators that it started."""
    if hasattr(os, "setpgid"):
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)


def _go_with(parent: Any) -> None:
    """End with the process that the values are for, which may be killed without a word."""
    if getattr(parent, "_sentinel", None) is not None:
        parent.join()
    else:  # not started by multiprocessing itself; there is nothing to wait for, but another parent shows
        first = os.getppid()
        while os.getppid() == first:
            time.sleep(1)
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"


def ping() -> str:
    """Something to do for a worker that has yet to start: say its name."""
    return _name()
