"""Tasks on their way to the workers of a pool and back, for one estimate."""

from __future__ import annotations

import itertools
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.buffers import from_bytes
from zograd.errors import DeterminismError, EvaluationTimeout, WorkerError
from zograd.evaluators.workers.shipping import unpacked_error
from zograd.evaluators.workers.worker import CENTER_POINT, Answer, Parcel, Task, at_home, fingerprint, work
from zograd.failures import tries

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from zograd.evaluators.objective import Objective
    from zograd.evaluators.points import Points
    from zograd.evaluators.workers.executor import Crew

_AHEAD = 2  # tasks under way for each worker: one that it does and one to go on with
_LETHAL = 2  # deaths of workers after which a task is watched by itself
torch_version: str = torch.__version__
_PROOF = 3  # deaths by itself, in a row, that are not by chance: other workers may die of anything
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(eq=False)
class _Errand:
    """Some points on their way."""

    lo: int
    hi: int
    tried: int = 0  # times that the policy let it be evaluated again
    deaths: int = 0  # of workers while it was under way
    alone: int = 0  # of these, with nothing else under way
    with_job: bool = False  # to be sent with all that the job needs
    begun: float | None = None  # when a worker must have taken it

    @property
    def points(self) -> int:
        return self.hi - self.lo

    def single(self) -> list[_Errand]:
        """Its points, each by itself."""
        if self.points == 1:
            return [self]
        return [_Errand(p, p + 1, deaths=self.deaths) for p in range(self.lo, self.hi)]


@dataclass
class _Values:
    """The values of a span of points, in any order."""

    first: int
    rows: torch.Tensor
    there: list[bool] = field(default_factory=list)
    ready: int = 0  # of which all are there

    def put(self, point: int, rows: torch.Tensor) -> None:
        at = point - self.first
        self.rows[at : at + len(rows)] = rows
        self.there[at : at + len(rows)] = [True] * len(rows)
        while self.ready < len(self.there) and self.there[self.ready]:
            self.ready += 1


class Dispatch:
    """Sends tasks, never too many at once, and takes the answers as they come.

    Args:
        crew: the executor.
        parcel: the estimate's job.
        fn: the objective, told of all that arrives.
        points: where.
        batch_size: points in a task.
        timeout: seconds for each evaluation.
    """

    def __init__(
        self, crew: Crew, parcel: Parcel, fn: Objective, points: Points, batch_size: int, timeout: float | None
    ) -> None:
        self._crew, self._parcel, self._fn, self._points = crew, parcel, fn, points
        self._batch, self._timeout = batch_size, timeout
        self._job = parcel.open()
        self._sides = len(points.sides)
        self._waiting: deque[_Errand] = deque()
        self._suspects: deque[_Errand] = deque()  # to be under way alone
        self._flying: dict[Future[Answer], _Errand] = {}
        self._serial = itertools.count()
        self._sent = 0  # times that the job was sent along, to this executor
        self._bringing: dict[str, _Errand] = {}  # what was last to bring the job, by the workers that missed it
        self._settled: set[str] = set()  # workers that have answered
        self._values: _Values | None = None
        self._center: torch.Tensor | None = None
        self._proof: bytes | None = None

    def __enter__(self) -> Dispatch:
        if self._timeout is not None:
            try:
                self._crew.meet()
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

    def center(self) -> torch.Tensor:
        """The value at the center."""
        self._waiting.append(_Errand(CENTER_POINT, CENTER_POINT + 1))
        while self._center is None:
            self._step()
        return self._center

    def directions(self, lo: int, hi: int) -> Iterator[torch.Tensor]:
        """The values of directions ``lo`` to ``hi``, of shape (directions, sides, *out), in order."""
        first, last, shape = lo * self._sides, hi * self._sides, tuple(self._fn.shape)
        rows = torch.empty((last - first, *shape), dtype=torch.float64)
        values = self._values = _Values(first, rows, [False] * (last - first))
        self._waiting.extend(_Errand(p, min(p + self._batch, last)) for p in range(first, last, self._batch))
        given = 0
        while given < hi - lo:
            self._step()
            ready = values.ready // self._sides
            if ready > given:
                self._fill()  # the workers go on while the values are summed
                piece = rows[given * self._sides : ready * self._sides]
                yield piece.view(ready - given, self._sides, *shape).to(self._fn.value.device)
                given = ready

    # ------------------------------------------------------------------------------------------------- under way

    def _step(self) -> None:
        """Send what may be sent, wait for something to happen and deal with it."""
        self._fill()
        done, _ = wait(self._flying, timeout=self._patience(), return_when=FIRST_COMPLETED)
        broken: BaseException | None = None
        for future in done:
            errand = self._flying.pop(future)
            try:
                answer = future.result()
            except (BrokenExecutor, CancelledError) as error:
                self._flying[future] = errand  # with all others, below
                broken = error
            except Exception as error:
                self._mishap(errand, error)
            else:
                self._take(errand, answer)
        if broken is not None:
            self._broken(broken)
        else:
            self._look_at_the_clock()

    def _fill(self) -> None:
        room = _AHEAD * self._crew.workers if self._flying else None
        while self._suspects or self._waiting:
            if self._suspects and not self._flying:
                self._send(self._suspects.popleft())
                return
            if not self._waiting or (self._alone()):
                return
            if self._flying:
                room = _AHEAD * self._crew.workers if room is None else room
                if len(self._flying) >= room:
                    return
            self._send(self._waiting.popleft())

    def _alone(self) -> bool:
        """Whether what is under way is watched, and must stay by itself; or is the last before such a one."""
        return bool(self._suspects) or any(e.deaths >= _LETHAL for e in self._flying.values())

    def _send(self, errand: _Errand) -> None:
        executor = self._crew.executor
        fn = self._fn
        habits = fn.habits.differentiates, fn.habits.draws
        task = Task(
            self._job.key, next(self._serial), errand.lo, errand.hi, self._points.sides, tuple(fn.shape), habits
        )
        # The first tasks bring the job; who got none of them will say so.
        with_job = errand.with_job or self._sent < self._crew.workers
        self._sent += with_job
        errand.begun = None
        try:
            future = executor.submit(work, task, self._parcel if with_job else None)
        except BrokenExecutor as error:
            self._waiting.appendleft(errand)
            self._broken(error)
        except RuntimeError as error:
            if "shutdown" not in str(error):
                raise
            raise WorkerError(f"`Pool`: its executor was shut down: {executor!r:.80}.") from error
        except Exception as error:
            self._mishap(errand, error)
        else:
            self._flying[future] = errand

    # ------------------------------------------------------------------------------------------------- answers

    def _take(self, errand: _Errand, answer: Answer) -> None:
        if answer.missing:
            self._bring(answer.worker, errand)
            return
        self._crew.names.add(answer.worker)
        self._settled.add(answer.worker)
        if answer.proof is not None:
            self._check(answer.worker, *answer.proof)
        fn = self._fn
        evaluations, retries, failures = answer.counts
        fn.count(evaluations, retries=retries, failures=failures)
        fn.failures += failures
        fn.habits.differentiates |= answer.habits[0]
        fn.habits.draws |= answer.habits[1]
        if errand.lo == CENTER_POINT:
            fn.repeated += evaluations - 1
            self._take_center(answer)
        else:
            fn.repeated += evaluations - self._take_values(errand, answer)
        if answer.error is not None:
            raise answer.error if isinstance(answer.error, BaseException) else unpacked_error(answer.error)

    def _bring(self, worker: str, errand: _Errand) -> None:
        """Send a task again, with the job unless another one is on its way with that to this worker, or one like it."""
        on_its_way = [*self._flying.values(), *self._waiting]
        if self._bringing.get(worker) not in on_its_way:
            self._bringing[worker] = errand
            errand.with_job = True
        self._waiting.appendleft(errand)

    def _take_center(self, answer: Answer) -> None:
        if answer.error is None:
            fn = self._fn
            exact = from_bytes(answer.data, answer.shape).to(self._job.space.device)
            fn.recall(exact.to(_DTYPES[answer.dtype]))
            self._center = exact

    def _take_values(self, errand: _Errand, answer: Answer) -> int:
        shape, fn = self._fn.shape, self._fn
        rows = from_bytes(answer.data, (-1, *shape)) if shape.numel() else torch.empty((errand.points, *shape))
        assert self._values is not None
        self._values.put(errand.lo, rows)
        if fn.arrived is not None:
            for point, row in enumerate(rows, errand.lo):
                i, j = divmod(point, self._sides)
                fn.arrived(i, j, row.item() if not shape else row.to(fn.value.device))
        return len(rows)

    def _check(self, worker: str, proof: bytes, version: str) -> None:
        if self._proof is None:
            self._proof = fingerprint(self._job.points)
        if version != torch_version:
            raise DeterminismError(
                f"`Pool`: worker {worker} has torch {version}, this process {torch_version}: directions, and so the "
                "gradient, may differ. Install the same version everywhere."
            )
        if proof != self._proof:
            raise DeterminismError(
                f"`Pool`: worker {worker} makes other points than this process from the same seed, as if it were "
                "another kind of machine. Its values would belong to another gradient."
            )

    # ------------------------------------------------------------------------------------------- what goes wrong

    def _mishap(self, errand: _Errand, error: Exception) -> None:
        """The executor itself failed to bring an answer."""
        if self._parcel.error is not None:
            raise WorkerError(
                f"`Pool`: {self._fn.name} or an argument cannot be sent to other processes: {self._parcel.error}. "
                "Define functions at the top of a module and pass what they need as arguments, or install cloudpickle."
            ) from self._parcel.error
        if type(error).__name__ == "KilledWorker":  # dask's: it tried on several
            self._failed(errand, self._died(errand, error))
            return
        raise WorkerError(f"`Pool`: the executor could not bring an answer: {error!r:.300}") from error

    def _broken(self, error: BaseException) -> None:
        """A worker died and took the executor along."""
        errands = list(self._flying.values())
        self._flying.clear()
        if not self._crew.owned:
            raise WorkerError(
                "`Pool`: a worker died, or its executor was ended, and nothing more can be evaluated by it. Give a "
                "function that makes the executor, as `Pool(lambda: ProcessPoolExecutor(4))`: then it is made anew."
            ) from error
        self._renew()
        alone = len(errands) == 1 and errands[0].points == 1 and errands[0].deaths >= _LETHAL
        if alone:
            errands[0].alone += 1
            if errands[0].alone < _PROOF:
                self._suspects.appendleft(errands[0])
            else:
                self._failed(errands[0], self._died(errands[0], error))
            return
        for errand in reversed(errands):
            errand.deaths += 1
            if errand.deaths < _LETHAL:
                self._waiting.appendleft(errand)
            else:
                self._suspects.extend(errand.single())

    def _renew(self) -> None:
        self._crew.end()
        self._sent = 0
        self._bringing.clear()
        self._settled.clear()

    def _died(self, errand: _Errand, error: BaseException) -> WorkerError:
        died = WorkerError(f"`Pool`: a worker died while it evaluated {self._fn.name} at {self._where(errand)}.")
        died.__cause__ = error
        return died

    def _where(self, errand: _Errand) -> str:
        if errand.lo == CENTER_POINT:
            return "the parameters themselves (the center)"
        i, j = divmod(errand.lo, self._sides)
        return f"direction {i} (offset {self._points.sides[j]:+g}) of the estimate with seed {self._job.seed}"

    def _failed(self, errand: _Errand, error: Exception) -> None:
        """One evaluation came to nothing: as the policy says."""
        fn, index = self._fn, errand.lo // self._sides if errand.lo != CENTER_POINT else CENTER_POINT
        fn.count(1)  # it did begin
        if errand.tried + 1 < tries(fn.policy):
            fn.fail(1, again=1)
            errand.tried, errand.alone = errand.tried + 1, 0
            self._waiting.appendleft(errand)
        elif fn.may_drop(index):
            fn.fail(1)
            assert self._values is not None
            self._values.put(errand.lo, torch.as_tensor(fn.lost(), dtype=torch.float64).cpu().unsqueeze(0))
        else:
            raise error

    # ------------------------------------------------------------------------------------------------- the clock

    def _look_at_the_clock(self) -> None:
        if self._timeout is None:
            return
        now = time.monotonic()
        late = {f: e for f, e in self._flying.items() if e.begun is not None and now >= self._deadline(e)}
        if not late:
            return
        if self._crew.owned and not self._crew.in_threads:
            others = [e for f, e in self._flying.items() if f not in late]
            self._flying.clear()
            self._renew()
            self._waiting.extendleft(reversed(others))
            begun = list(late.values())
        else:
            begun = self._leave_behind(late)
        for errand in begun:
            if errand.points > 1:
                self._waiting.extendleft(reversed(errand.single()))
            else:
                self._failed(errand, self._too_long(errand))

    def _too_long(self, errand: _Errand) -> EvaluationTimeout:
        return EvaluationTimeout(
            f"`Pool(timeout={self._timeout:g})`: {self._fn.name} took longer at {self._where(errand)}."
        )

    def _leave_behind(self, late: dict[Future[Answer], _Errand]) -> list[_Errand]:
        """Give up tasks whose workers cannot be ended, and return those that had begun."""
        begun = []
        for future, errand in late.items():
            del self._flying[future]
            if future.cancel():  # no worker was free to take it
                self._waiting.appendleft(errand)
            else:
                self._crew.abandon(future)
                begun.append(errand)
        if self._crew.lost >= self._crew.workers:
            raise EvaluationTimeout(
                f"`Pool(timeout={self._timeout:g})`: all {self._crew.workers} workers hang in {self._fn.name}, and an "
                "executor of others, or of threads, cannot be ended. Give a function that makes one of processes."
            )
        return begun

    def _deadline(self, errand: _Errand) -> float:
        assert self._timeout is not None
        assert errand.begun is not None
        # As long as a worker may still be starting, or importing what fn needs, it has the time that the first one had.
        starting = len(self._settled) < self._crew.workers
        return errand.begun + self._timeout * errand.points + starting * (1 + 2 * self._crew.started)

    def _patience(self) -> float | None:
        """Seconds until the first task is late; each that a worker must have taken by now is on the clock."""
        if self._timeout is None:
            return None
        now = time.monotonic()
        busy = max(1, len(self._crew.names) - self._crew.lost)
        for errand in itertools.islice(self._flying.values(), busy):
            if errand.begun is None:
                errand.begun = now
        begun = [self._deadline(e) for e in self._flying.values() if e.begun is not None]
        return max(0.0, min(begun) - now) if begun else None

    def _leave(self, *, patient: bool) -> None:
        """The end: nothing is begun any more, and what is under way is waited for and counted."""
        if self._flying and not patient and self._crew.owned:
            self._flying.clear()
            self._crew.end()
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
            self._crew.abandon(future)
        if self._flying and self._crew.owned:
            self._crew.end()
        self._flying.clear()

    def _take_last(self, errand: _Errand, future: Future[Any]) -> None:
        try:
            self._take(errand, future.result())
        except Exception:  # the first error is the one that is told
            return
