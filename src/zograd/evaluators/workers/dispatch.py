"""Tasks on their way to the workers of a pool and back, for one estimate."""

from __future__ import annotations

import copy
import itertools
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zograd._base.streams import CENTER
from zograd.errors import EvaluationTimeout, WorkerError
from zograd.evaluators.task.answer import Answer, beside
from zograd.evaluators.workers.worker import PickledJob, Reply, Task, at_home, work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points
    from zograd.evaluators.workers.executor import Workers

_AHEAD = 2  # tasks under way for each worker: one that it does and one to go on with
_LETHAL = 2  # deaths of workers after which a task is watched by itself
_PROOF = 3  # deaths by itself, in a row, that are not by chance: other workers may die of anything


@dataclass(eq=False)
class _Pending:
    """Some points on their way: those of directions ``lo`` to ``hi`` at some offsets, or the center at none."""

    lo: int
    hi: int
    offsets: tuple[float, ...]
    tried: int = 0  # times that the policy let it be evaluated again
    deaths: int = 0  # of workers while it was under way
    alone: int = 0  # of these, with nothing else under way
    with_job: bool = False  # to be sent with all that the job needs
    begun: float | None = None  # when a worker must have taken it
    answer: Answer | None = None
    parts: list[_Pending] | None = None  # it was taken apart, and these are under way in its place

    @property
    def points(self) -> int:
        return (self.hi - self.lo) * len(self.offsets) if self.offsets else 1

    def single(self) -> list[_Pending]:
        """Return its points, each by itself; they answer in its place."""
        if self.points == 1:
            return [self]
        directions = range(self.lo, self.hi)
        self.parts = [_Pending(i, i + 1, (c,), deaths=self.deaths) for i in directions for c in self.offsets]
        return self.parts

    def done(self) -> Answer | None:
        """Return the answer, or None if a part of it is missing."""
        if self.answer is None and self.parts is not None:
            answers = [part.answer for part in self.parts]
            found = [answer for answer in answers if answer is not None]
            if len(found) == len(answers):
                self.answer = beside(found, self.hi - self.lo)
        return self.answer


class Dispatch:
    """Sends tasks, never too many at once, and takes the answers as they come.

    Args:
        workers: the executor.
        pickled: the estimate's job.
        fn: the objective, told of all that arrives.
        points: where.
        batch_size: points in a task.
        timeout: seconds for each evaluation.
    """

    def __init__(
        self,
        workers: Workers,
        pickled: PickledJob,
        fn: Objective,
        points: Points,
        batch_size: int,
        timeout: float | None,
    ) -> None:
        self._workers, self._pickled, self._fn, self._points = workers, pickled, fn, points
        self._batch, self._timeout = batch_size, timeout
        self._job = pickled.open()
        self._waiting: deque[_Pending] = deque()
        self._suspects: deque[_Pending] = deque()  # to be under way alone
        self._flying: dict[Future[Reply], _Pending] = {}
        self._serial = itertools.count()
        self._bringing: dict[str, _Pending] = {}  # what was last to bring the job, by the workers that missed it
        self._settled: set[str] = set()  # workers that have answered
        self._error: Answer | None = None

    def __enter__(self) -> Dispatch:
        if self._timeout is not None:
            try:
                self._workers.meet()
            except BrokenExecutor as error:
                self._broken(error)
        at_home[self._job.key] = self._job
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            patient = error is None or isinstance(error, (Exception, GeneratorExit))
            self._leave(patient=patient)
        finally:
            at_home.pop(self._job.key, None)

    # --------------------------------------------------------------------------------------------- what is asked for

    def center(self) -> Answer:
        """Return the center's answer."""
        return next(self._answers([_Pending(CENTER, CENTER + 1, ())]))

    def directions(self, lo: int, hi: int) -> Iterator[Answer]:
        """Yield the answers of directions ``lo`` to ``hi``, in order."""
        offsets, batch = self._points.offsets, self._batch
        if batch >= len(offsets):
            step = batch // len(offsets)
            return self._answers([_Pending(i, min(i + step, hi), offsets) for i in range(lo, hi, step)])
        parts = [offsets[j : j + batch] for j in range(0, len(offsets), batch)]
        whole = []
        for i in range(lo, hi):
            whole.append(_Pending(i, i + 1, offsets))
            whole[-1].parts = [_Pending(i, i + 1, part) for part in parts]
        return self._answers(whole)

    def _answers(self, tasks: list[_Pending]) -> Iterator[Answer]:
        for task in tasks:
            self._waiting.extend(task.parts or [task])
        for task in tasks:
            while (answer := self._error or task.done()) is None:
                self._step()
            self._fill()  # the workers go on while the values are summed
            yield answer
            task.answer = task.parts = None

    # ------------------------------------------------------------------------------------------------- under way

    def _step(self) -> None:
        """Send what may be sent, wait for something to happen and deal with it."""
        self._fill()
        done, _ = wait(self._flying, timeout=self._patience(), return_when=FIRST_COMPLETED)
        broken: BaseException | None = None
        for future in done:
            task = self._flying.pop(future)
            try:
                answer = future.result()
            except (BrokenExecutor, CancelledError) as error:
                self._flying[future] = task  # with all others, below
                broken = error
            except Exception as error:
                self._mishap(task, error)
            else:
                self._take(task, answer)
        if broken is not None:
            self._broken(broken)
        else:
            self._look_at_the_clock()

    def _fill(self) -> None:
        most = _AHEAD * self._workers.workers if self._flying else None
        while self._suspects or self._waiting:
            if self._suspects and not self._flying:
                self._send(self._suspects.popleft())
                return
            if not self._waiting or (self._alone()):
                return
            if self._flying:
                most = _AHEAD * self._workers.workers if most is None else most
                if len(self._flying) >= most:
                    return
            self._send(self._waiting.popleft())

    def _alone(self) -> bool:
        """Return whether what is under way is watched, and must stay by itself; or is the last before such a one."""
        return bool(self._suspects) or any(e.deaths >= _LETHAL for e in self._flying.values())

    def _send(self, pending: _Pending) -> None:
        executor, fn = self._workers.executor, self._fn
        task = Task(
            self._job.key,
            next(self._serial),
            pending.lo,
            pending.hi,
            pending.offsets,
            tuple(fn.shape),
            copy.copy(fn.facts),
        )
        # The first tasks bring the job; who got none of them will say so.
        with_job = pending.with_job or self._pickled.sent < self._workers.workers
        self._pickled.sent += with_job
        pending.begun = None
        try:
            future = executor.submit(work, task, self._pickled if with_job else None)
        except BrokenExecutor as error:
            self._waiting.appendleft(pending)
            self._broken(error)
        except RuntimeError as error:
            if "shutdown" not in str(error):
                raise
            raise WorkerError(f"`Pool`: its executor was shut down: {executor!r:.80}.") from error
        except Exception as error:
            self._mishap(pending, error)
        else:
            self._flying[future] = pending

    # ------------------------------------------------------------------------------------------------- answers

    def _take(self, task: _Pending, reply: Reply) -> None:
        if reply.answer is None:
            self._bring(reply.worker, task)
            return
        self._workers.names.add(reply.worker)
        self._settled.add(reply.worker)
        self._settle(task, reply.answer)

    def _settle(self, task: _Pending, answer: Answer) -> None:
        fn = self._fn
        fn.merge(answer.report, self._points, "`Pool`")
        task.answer = answer
        if answer.error is not None:
            self._error = self._error or answer
        elif fn.arrived is not None and task.offsets:
            offsets = self._points.offsets
            for i, row in enumerate(answer.values, task.lo):
                for c, value in zip(task.offsets, row, strict=True):
                    fn.arrived(i * len(offsets) + offsets.index(c), value)

    def _bring(self, worker: str, task: _Pending) -> None:
        """Send a task again, with the job unless another one is on its way with that to this worker, or one like it."""
        on_its_way = [*self._flying.values(), *self._waiting]
        if self._bringing.get(worker) not in on_its_way:
            self._bringing[worker] = task
            task.with_job = True
        self._waiting.appendleft(task)

    # ------------------------------------------------------------------------------------------- what goes wrong

    def _mishap(self, task: _Pending, error: Exception) -> None:
        """The executor itself failed to bring an answer."""
        if self._pickled.error is not None:
            raise WorkerError(
                f"`Pool`: {self._fn.name} or an argument cannot be sent to other processes: {self._pickled.error}. "
                "Define functions at the top of a module and pass what they need as arguments, or install cloudpickle."
            ) from self._pickled.error
        if type(error).__name__ == "KilledWorker":  # dask's: it tried on several
            self._failed(task, self._died(task, error))
            return
        raise WorkerError(f"`Pool`: the executor could not bring an answer: {error!r:.300}") from error

    def _broken(self, error: BaseException) -> None:
        """A worker died and took the executor along."""
        tasks = list(self._flying.values())
        self._flying.clear()
        if not self._workers.owned:
            raise WorkerError(
                "`Pool`: a worker died, or its executor was ended, and nothing more can be evaluated by it. Give a "
                "function that makes the executor, as `Pool(lambda: ProcessPoolExecutor(4))`: then it is made anew."
            ) from error
        self._renew()
        alone = len(tasks) == 1 and tasks[0].points == 1 and tasks[0].deaths >= _LETHAL
        if alone:
            tasks[0].alone += 1
            if tasks[0].alone < _PROOF:
                self._suspects.appendleft(tasks[0])
            else:
                self._failed(tasks[0], self._died(tasks[0], error))
            return
        for task in reversed(tasks):
            task.deaths += 1
            if task.deaths < _LETHAL:
                self._waiting.appendleft(task)
            else:
                self._suspects.extend(task.single())

    def _renew(self) -> None:
        self._workers.end()
        self._pickled.sent = 0
        self._bringing.clear()
        self._settled.clear()

    def _died(self, task: _Pending, error: BaseException) -> WorkerError:
        died = WorkerError(f"`Pool`: a worker died while it evaluated {self._fn.name} at {self._where(task)}.")
        died.__cause__ = error
        return died

    def _where(self, task: _Pending) -> str:
        if not task.offsets:
            return "the parameters themselves (the center)"
        seed = self._points.directions.seed
        return f"direction {task.lo} (offset {task.offsets[0]:+g}) of the estimate with seed {seed}"

    def _failed(self, task: _Pending, error: Exception) -> None:
        """Have one evaluation that came to nothing judged."""
        answer = self._fn.give_up(task.lo, error, task.tried)
        if answer is not None:
            self._settle(task, answer)
            return
        task.tried, task.alone = task.tried + 1, 0
        self._waiting.appendleft(task)

    # ------------------------------------------------------------------------------------------------- the clock

    def _look_at_the_clock(self) -> None:
        if self._timeout is None:
            return
        now = time.monotonic()
        late = {f: e for f, e in self._flying.items() if e.begun is not None and now >= self._deadline(e)}
        if not late:
            return
        if self._workers.owned and not self._workers.in_threads:
            others = [e for f, e in self._flying.items() if f not in late]
            self._flying.clear()
            self._renew()
            self._waiting.extendleft(reversed(others))
            begun = list(late.values())
        else:
            begun = self._leave_behind(late)
        for task in begun:
            if task.points > 1:
                self._waiting.extendleft(reversed(task.single()))
            else:
                self._failed(task, self._too_long(task))

    def _too_long(self, task: _Pending) -> EvaluationTimeout:
        return EvaluationTimeout(
            f"`Pool(timeout={self._timeout:g})`: {self._fn.name} took longer at {self._where(task)}."
        )

    def _leave_behind(self, late: dict[Future[Reply], _Pending]) -> list[_Pending]:
        """Give up tasks whose workers cannot be ended, and return those that had begun."""
        begun = []
        for future, task in late.items():
            del self._flying[future]
            if future.cancel():  # no worker was free to take it
                self._waiting.appendleft(task)
            else:
                self._workers.abandon(future)
                begun.append(task)
        if self._workers.lost >= self._workers.workers:
            raise EvaluationTimeout(
                f"`Pool(timeout={self._timeout:g})`: all {self._workers.workers} workers hang in {self._fn.name}, and "
                "an executor of others, or of threads, cannot be ended. Give a function that makes one of processes."
            )
        return begun

    def _deadline(self, task: _Pending) -> float:
        assert self._timeout is not None
        assert task.begun is not None
        # As long as a worker may still be starting, or importing what fn needs, it has the time that the first one had.
        starting = len(self._settled) < self._workers.workers
        return task.begun + self._timeout * task.points + starting * (1 + 2 * self._workers.started)

    def _patience(self) -> float | None:
        """Seconds until the first task is late; each that a worker must have taken by now is on the clock."""
        if self._timeout is None:
            return None
        now = time.monotonic()
        busy = max(1, len(self._workers.names) - self._workers.lost)
        for task in itertools.islice(self._flying.values(), busy):
            if task.begun is None:
                task.begun = now
        begun = [self._deadline(e) for e in self._flying.values() if e.begun is not None]
        return max(0.0, min(begun) - now) if begun else None

    def _leave(self, *, patient: bool) -> None:
        """The end: nothing is begun any more, and what is under way is waited for and counted."""
        if self._flying and not patient and self._workers.owned:
            self._flying.clear()
            self._workers.end()
        self._waiting.clear()
        self._suspects.clear()
        for future in list(self._flying):
            if future.cancel():
                del self._flying[future]
        while self._flying and patient:
            done, late = wait(self._flying, timeout=self._patience(), return_when=FIRST_COMPLETED)
            for future in done:
                self._take_last(self._flying.pop(future), future)
            if not done and late:
                break
        for future in self._flying:
            self._workers.abandon(future)
        if self._flying and self._workers.owned:
            self._workers.end()
        self._flying.clear()

    def _take_last(self, task: _Pending, future: Future[Reply]) -> None:
        try:
            self._take(task, future.result())
        except Exception:  # the first error is the one that is told
            return
