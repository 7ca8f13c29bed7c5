"""The user's function as evaluators see it: a map from points to float64 values, which judges its failures."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from zograd._base.digest import Digest
from zograd._base.execution import Modes
from zograd._base.isolation import center_of, commit
from zograd._base.streams import CENTER, FnStream
from zograd._base.torch_private import transforms_active
from zograd.distributions.factored import dense
from zograd.errors import DeterminismError, EvaluationError, NonFiniteError, WorkerError
from zograd.evaluators.task.answer import Answer, Facts, Report
from zograd.failures import dropping, is_failure, tries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd._base.trees import Arguments, Leaves
    from zograd.evaluators.task.points import Points
    from zograd.failures import Failures

Value: TypeAlias = "float | torch.Tensor"
How: TypeAlias = "Callable[[Objective, Points, int, int], torch.Tensor]"
"""How an evaluator calls ``fn`` at the points of some directions; returns their values, (directions, offsets, *out)."""

V = TypeVar("V", float, torch.Tensor, "float | torch.Tensor")

_NAMED = 8  # points that an error lists
_NOTHING = contextlib.nullcontext()


class Objective:
    """``fn`` with everything but its differentiated leaves filled in; a task is one call of :meth:`evaluate`.

    It sets the random state for each evaluation, checks what comes back and keeps a float64 copy, made before the next
    point is (an ``fn`` may return a view of its argument). An evaluation that raises or gives a value that is not
    finite is judged here and nowhere else: it is repeated, given up as nan, or the answer has an error.

    Points require grad only if ``fn`` uses autograd itself. That shows at the center, which is watched for it, or when
    autograd complains; then that evaluation is repeated, and the fact remembered.

    An objective pickles, and evaluates in another process as it would here: under the caller's default dtype, device
    and autocast, with the random state that belongs to the seed.

    Args:
        fn: the user's function.
        arguments: the call, taken apart.
        params: the differentiated leaves, of which only the device and the dtypes are kept.
        facts: what earlier calls have shown.
        policy: what an evaluation that fails means.
        judges: whether a value that is not finite is a failure.

    Attributes:
        evaluations: evaluations of ``fn`` so far, repeated ones included.
        failures: those that failed and were dealt with by the policy.
        counted: called with (evaluations, retries, failures) as they happen.
        arrived: called with the number and the value of each point as soon as it is there.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        arguments: Arguments,
        params: Leaves,
        facts: Facts,
        policy: Failures = "raise",
        *,
        judges: bool = True,
    ) -> None:
        self.fn = fn
        self.arguments = arguments
        self.facts = facts
        self.policy = policy
        self.judges: bool = judges
        self.device: torch.device = params[0].device  # that of the values, once the center's is there
        self.shape: torch.Size = torch.Size()
        self.stream: FnStream | None = None
        self.shared: bool = False  # whether all points see the center's random numbers
        self.seed: int = 0
        self.evaluations: int = 0
        self.failures: int = 0
        self.counted: Callable[[int, int, int], None] | None = None
        self.arrived: Callable[[int, torch.Tensor], None] | None = None
        self.sent: Any = None  # what an evaluator sends to its workers, once an estimate
        self._double = any(p.dtype == torch.float64 for p in params)
        self._others = _requiring_grad(arguments)
        self._report = Report()
        self._away: _Surroundings | None = None  # what has to hold where the objective is not at home
        self._proof: tuple[str, bytes] | None = None

    @property
    def name(self) -> str:
        """How errors call the function."""
        return function_name(self.fn)

    # ------------------------------------------------------------------------------------------------ one estimate

    @contextlib.contextmanager
    def estimating(self, seed: int, *, shared: bool) -> Iterator[None]:
        """Hold the random state of an estimate; at its end the center's traces stay.

        Args:
            seed: the estimate's.
            shared: whether all points see the center's random numbers.

        Yields:
            Nothing.
        """
        self.seed, self.shared = seed, shared
        # User code needs grad mode, whoever calls us: an inner training loop is the main use.
        with torch.enable_grad(), FnStream(seed, self.device, shared=shared) as self.stream:
            try:
                yield
            finally:
                self.stream = None
        commit(self.fn)

    def take(self, answer: Answer, points: Points) -> torch.Tensor:
        """Merge an answer's report, and return its values.

        Args:
            answer: of some directions.
            points: where; they tell whether a worker holds the same ones.

        Returns:
            The values, on the device of the center's.

        Raises:
            DeterminismError: if a worker has another torch or makes other points.
        """
        self.merge(answer.report, points)
        if answer.error is not None:
            try:
                raise answer.error
            finally:
                del answer  # which holds the error, whose traceback holds this frame
        return answer.values.to(self.device)

    def take_center(self, answer: Answer, points: Points) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the center's answer, which tells the shape of all values.

        Args:
            answer: of the center.
            points: where.

        Returns:
            The value in float64, and as ``fn`` returned it.
        """
        self.device = answer.device
        exact = self.take(answer, points)
        self.shape = exact.shape
        return exact, exact.clone() if answer.dtype == torch.float64 else exact.to(answer.dtype)

    def merge(self, report: Report, points: Points, typed: str = "the evaluator") -> None:
        """Add up what evaluations cost and showed, once; of a worker's nobody has told the tracker yet.

        Args:
            report: of an answer.
            points: where; they tell whether a worker holds the same ones.
            typed: how errors call the evaluator.

        Raises:
            DeterminismError: if a worker has another torch or makes other points.
        """
        if report.counted:
            return
        self._add(report)
        if report.proof is not None:
            self._check_proof(report, points, typed)

    def _add(self, report: Report) -> None:
        report.counted = True
        self.evaluations += report.evaluations
        self.failures += report.failures
        self.facts.learn(report.facts)
        if report.worker is not None and self.counted is not None:
            self.counted(report.evaluations, report.retries, report.failures)

    def _check_proof(self, report: Report, points: Points, typed: str) -> None:
        if self._proof is None:
            self._proof = proof(points)
        (version, digest), (mine, wanted) = cast("tuple[str, bytes]", report.proof), self._proof
        if version != mine:
            raise DeterminismError(
                f"{typed}: worker {report.worker} has torch {version}, this process {mine}: directions, and so the "
                "gradient, may differ. Install the same version everywhere."
            )
        if digest != wanted:
            raise DeterminismError(
                f"{typed}: worker {report.worker} makes other points than this process from the same seed, as if it "
                "were another kind of machine. Its values would belong to another gradient."
            )

    @contextlib.contextmanager
    def unjudged(self) -> Iterator[None]:
        """Let values that are not finite pass, for an evaluator that has them judged later.

        Yields:
            Nothing.
        """
        judges, self.judges = self.judges, False
        try:
            yield
        finally:
            self.judges = judges

    # ------------------------------------------------------------------------------------------------------- tasks

    def evaluate(self, points: Points, lo: int, hi: int, how: How | None = None) -> Answer:
        """Evaluate the points of directions ``lo`` to ``hi``.

        Args:
            points: where.
            lo: the first direction.
            hi: one past the last.
            how: how ``fn`` is called, point by point if not given.

        Returns:
            Values of shape (directions, offsets, *out), or an error, with a report.
        """

        def run() -> torch.Tensor:
            values = (how or Objective.one_by_one)(self, points, lo, hi)
            if not self._accepts(values):
                raise self._not_finite(values, points.offsets, lo)
            return values

        return self._answer(points, run)

    def center(self, points: Points, *, batched: bool = False) -> Answer:
        """Evaluate the parameters themselves, in one plain call.

        Args:
            points: those of the estimate.
            batched: whether ``fn`` takes a leading axis of parameter sets, here of length one.

        Returns:
            The value, of the shape of all others, with a report.
        """
        dtypes: list[torch.dtype] = []
        answer = self._answer(points, functools.partial(self._at_center, points, dtypes, batched=batched))
        if dtypes:
            answer.dtype = dtypes[-1]
        return answer

    def _answer(self, points: Points, run: Callable[[], torch.Tensor]) -> Answer:
        report = self._report = Report(facts=self.facts)
        away = self._away
        try:
            with _NOTHING if away is None else away.entered(self, points):
                return Answer(run(), report)
        except SystemExit as error:
            if away is None:
                raise
            ended = WorkerError(f"{self.name} called `sys.exit({error.code!r})` in a worker.")
            ended.__cause__ = error
            return Answer(_NO_VALUES, report, ended)
        except Exception as error:
            return Answer(_NO_VALUES, report, error)

    def one_by_one(self, points: Points, lo: int, hi: int) -> torch.Tensor:
        """Return the values at the points of directions ``lo`` to ``hi``, one call each; not those after a failure."""
        sides, values = len(points.offsets), []
        for number, point in enumerate(points.each(lo, hi), lo * sides):
            value = self._at_point(points, number, point)
            values.append(value)
            if self.arrived is not None:
                self.arrived(number, torch.as_tensor(value, dtype=torch.float64))
            if not (number + 1) % sides and not all(map(self._accepts, values[-sides:])):
                break
        if not self.shape and isinstance(values[0], float):
            return torch.tensor(values, dtype=torch.float64, device="cpu").view(-1, sides)
        rows = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
        return rows.view(len(values) // sides, sides, *self.shape)

    # ------------------------------------------------------------------------------------------------- evaluations

    def _at_center(self, points: Points, dtypes: list[torch.dtype], *, batched: bool) -> torch.Tensor:
        call = functools.partial(self._call, center_of(self.fn))
        rows = range(CENTER, CENTER + 1) if batched else None

        def params() -> Leaves:
            return tuple([leaf.unsqueeze(0) for leaf in points.center()]) if batched else points.center()

        def evaluate() -> torch.Tensor:
            out = self._run(call, params(), params, CENTER, rows=rows)
            value = self._as_tensor(out).detach()
            if batched:
                value = self._drop_leading_one(value)
            # A copy, since fn may have returned a view of its argument.
            exact = value.clone() if value.dtype == torch.float64 else value.double()
            if isinstance(out, (int, float)):
                exact.fill_(out)  # as exact as the values at the other points
            number = not isinstance(out, torch.Tensor) and self._double
            dtypes.append(torch.float64 if number else value.dtype)
            return exact

        if tries(self.policy) > 1:
            exact: torch.Tensor = self._by_policy(evaluate, CENTER, None)
        else:
            exact = evaluate()
        self.judge_center(exact)
        return exact

    def judge_center(self, exact: torch.Tensor) -> None:
        """Raise NonFiniteError if the center's value is not finite."""
        if self.judges and not all_finite(exact):
            bad = int((~torch.isfinite(exact)).sum())
            raise NonFiniteError(
                f"{self.name} returned {bad} non-finite value{'s' * (bad > 1)} of {exact.numel()} at the parameters "
                f"themselves (the center): {exact.flatten()[:_NAMED].tolist()}."
            )

    def _at_point(self, points: Points, number: int, point: Leaves) -> Value:
        """Return the value at one point: a float for one number on the CPU, else a float64 tensor."""
        index = number // len(points.offsets)
        if self.policy != "raise":  # each try at a point of its own, since fn may write to it before it fails
            again = functools.partial(points.__getitem__, number)
            return self._by_policy(lambda: self._value(again(), again, index), index, None)
        return self._value(point, functools.partial(points.__getitem__, number), index)

    def _value(self, point: Leaves, again: Callable[[], Leaves], index: int) -> Value:
        try:
            out = self._run(functools.partial(self._call, self.fn), point, again, index)
        except Exception as error:
            if is_failure(error):
                raise self._failed(error, f"direction {index}") from error
            raise
        if type(out) is float and not self.shape:
            return out
        out = self._as_tensor(out)
        if out.shape != self.shape:
            raise self._wrong_shape(out.shape, self.shape)
        if not self.shape and out.device.type == "cpu":
            return out.item()
        return out.detach().to(torch.float64, copy=True)

    def batched(self, points: Points, lo: int, hi: int) -> torch.Tensor:
        """Return the values at the points of directions ``lo`` to ``hi``, one call of ``fn`` for each offset."""

        def column(offset: float) -> torch.Tensor:
            def rows() -> Leaves:
                return points.rows(lo, hi, (offset,))

            def evaluate() -> torch.Tensor:
                try:
                    out = self._run(functools.partial(self._call, self.fn), rows(), rows, lo, rows=range(lo, hi))
                except Exception as error:
                    if is_failure(error):
                        raise self._failed(error, f"directions {lo} to {hi - 1}") from error
                    raise
                return self._rows(self._as_tensor(out), hi - lo)

            return evaluate() if self.policy == "raise" else self._by_policy(evaluate, lo, hi - lo)

        return torch.stack([column(offset) for offset in points.offsets], dim=1)

    def vectorized(
        self, points: Points, lo: int, hi: int, offsets: tuple[float, ...], randomness: str
    ) -> torch.Tensor | None:
        """Return the values at the points of directions ``lo`` to ``hi`` by one call of ``torch.vmap(fn)``.

        Args:
            points: where.
            lo: the first direction.
            hi: one past the last.
            offsets: which of the points of each direction.
            randomness: as torch.vmap has it; with ``"error"`` an ``fn`` that draws is found out and not counted.

        Returns:
            Values of shape (directions, offsets, *out); None if ``fn`` drew although it must not.

        Raises:
            RuntimeError: if ``fn`` cannot be vectorized.
        """
        num = (hi - lo) * len(offsets)

        def evaluate() -> torch.Tensor:
            rows, to_point = points.factors(lo, hi, offsets)

            # The check for a tensor comes inside: vmap has its own words for anything else.
            def one(row: Leaves) -> torch.Tensor:
                return as_tensor(dense(self._call(self.fn, to_point(row))), self.name)

            call = torch.vmap(one, randomness=randomness)
            return self._rows(self._run(call, rows, lambda: rows, lo, vmapped=num), num)

        try:
            by_offset = evaluate() if self.policy == "raise" else self._by_policy(evaluate, lo, num, raises=True)
        except RuntimeError as error:
            if randomness != "error" or "randomness error mode" not in str(error):
                raise
            self.facts.draws = True
            self._count(-num)
            return None
        return by_offset.view(len(offsets), hi - lo, *self.shape).transpose(0, 1)

    def _rows(self, out: torch.Tensor, num: int) -> torch.Tensor:
        wanted = torch.Size((num, *self.shape))
        if out.shape != wanted:
            raise self._wrong_shape(out.shape, wanted)
        return out.detach().to(torch.float64, copy=True)

    # ---------------------------------------------------------------------------------------------------- judgement

    def _accepts(self, value: Value) -> bool:
        """Return whether a value, or values, may go on to the estimate: finite ones, or nan that a policy drops."""
        if isinstance(value, float):
            return math.isfinite(value) or not self.judges or dropping(self.policy) is not None
        return not self.judges or dropping(self.policy) is not None or all_finite(value)

    def _by_policy(self, evaluate: Callable[[], V], index: int, rows: int | None, *, raises: bool = False) -> V:
        """Evaluate one point, or many, as often as the policy says; what is given up is nan.

        Args:
            evaluate: makes the points and evaluates them.
            index: the first direction.
            rows: how many points there are, with a row of values each; None for one.
            raises: whether exceptions of ``fn`` go up as they are.

        Returns:
            The values.
        """
        kept: Any = None
        for left in reversed(range(tries(self.policy))):
            goes_on = left or (index != CENTER and dropping(self.policy) is not None)
            try:
                value = evaluate()
            except Exception as error:
                if raises or not is_failure(error) or not goes_on:
                    raise
                failed = rows or 1
            else:
                kept = value if kept is None else _completed(kept, value, rows)
                if not _lost(kept, rows) or not goes_on:
                    return cast("V", kept)
                failed = _lost(value, rows)
            self._count(0, (rows or 1) if left else 0, failed)
        return cast("V", self._given_up(rows) if kept is None else kept)

    def _given_up(self, rows: int | None) -> Value:
        if rows is None and not self.shape:
            return math.nan
        shape = self.shape if rows is None else (rows, *self.shape)
        return torch.full(shape, math.nan, dtype=torch.float64, device=self.device)

    def _not_finite(self, values: torch.Tensor, offsets: tuple[float, ...], lo: int) -> NonFiniteError:
        points = (~torch.isfinite(values)).flatten(2).any(dim=2) if values.dim() > 2 else ~torch.isfinite(values)
        where = [f"{lo + i} (offset {offsets[j]:+g})" for i, j in points.nonzero()[:_NAMED].tolist()]
        count, hi = int(points.sum()), lo + len(values)
        return NonFiniteError(
            f"{self.name} returned non-finite values at {count} of {points.numel()} points, those of directions {lo} "
            f"to {hi - 1}: at direction {', '.join(where)}{', ...' if count > _NAMED else ''}. A gradient from them "
            "would be wrong; return a finite penalty instead, of the size of the other values."
        )

    def give_up(self, index: int, error: Exception, tried: int) -> Answer | None:
        """Judge an evaluation that a worker did not survive, or did not end in time.

        Args:
            index: the direction.
            error: what became of the evaluation.
            tried: how often it has been tried before.

        Returns:
            None if it is to be tried again; else an answer that gives it up, or has the error.
        """
        report = Report(1, worker="")  # it did begin
        if tried + 1 < tries(self.policy):
            self._add(replace(report, retries=1, failures=1))
            return None
        if index == CENTER or dropping(self.policy) is None:
            return Answer(_NO_VALUES, report, error)
        report.failures = 1
        lost = torch.full((1, 1, *self.shape), math.nan, dtype=torch.float64, device="cpu")
        return Answer(lost, report)

    def _failed(self, error: Exception, where: str) -> EvaluationError:
        seed = "" if self.stream is None else f" of the estimate with seed {self.stream.seed}"
        return EvaluationError(f"{self.name} raised {type(error).__name__} at {where}{seed}: {error}")

    def _wrong_shape(self, got: torch.Size, wanted: torch.Size) -> ValueError:
        return ValueError(f"{self.name} must return one shape at all points, got {tuple(got)} after {tuple(wanted)}.")

    # ------------------------------------------------------------------------------------------------- calls of fn

    def _run(
        self,
        call: Callable[[Leaves], Any],
        params: Leaves,
        again: Callable[[], Leaves],
        index: int,
        *,
        rows: range | None = None,
        vmapped: int = 0,
    ) -> Any:
        """Call ``fn``, once more with tensors that require grad if it turns out to use autograd."""
        # `again` makes the point anew, since fn may have written to it; `vmapped` is how many points the call serves.
        self._begin(index, rows, vmapped)
        if self.facts.differentiates:
            return self._run_tracked(call, params, again, index, rows, vmapped)
        try:
            if index != CENTER:
                return call(params)
            with _WatchAutograd(params) as watch:
                out = call(params)
            if not watch.seen:
                return out
        except (RuntimeError, TypeError, _NeedsGrad) as error:
            if "escaped" in str(error):
                raise self._closed_over() from error
            if not wants_grad(error):
                raise
        self._begin(index, rows, vmapped)
        out = self._run_tracked(call, again(), again, index, rows, vmapped)
        self.facts.differentiates = True  # only now: the complaint may have been about something else
        return out

    def _run_tracked(
        self,
        call: Callable[[Leaves], Any],
        params: Leaves,
        again: Callable[[], Leaves],
        index: int,
        rows: range | None,
        vmapped: int,
    ) -> Any:
        if vmapped:
            raise RuntimeError(
                f'{self.name} uses autograd itself, which `evaluator="vmap"` cannot follow for many points at once: '
                'use `evaluator="loop"`.'
            )
        try:
            return call(tuple([leaf.requires_grad_() for leaf in params]))
        except RuntimeError as error:
            if not refuses_grad(error):
                raise
        # It uses autograd in some calls, and numpy in this one.
        self._begin(index, rows, vmapped)
        return call(again())

    def _begin(self, index: int, rows: range | None, vmapped: int) -> None:
        if self.stream is not None:
            self.stream.at(index, rows, vmapped=bool(vmapped))
        self._count(vmapped or (1 if rows is None else len(rows)))

    def _count(self, evaluations: int, retries: int = 0, failures: int = 0) -> None:
        report = self._report
        report.evaluations += evaluations
        report.retries += retries
        report.failures += failures
        if self.counted is not None:
            self.counted(evaluations, retries, failures)

    def _call(self, fn: Callable[..., Any], params: Leaves) -> Any:
        for leaf in self._others:
            leaf.grad = None  # what an earlier evaluation may have left there
        args, kwargs = self.arguments.build(params)
        return fn(*args, **kwargs)

    def _as_tensor(self, out: Any) -> torch.Tensor:
        # Told the name only if it has something to say: that takes as long as all the rest.
        return out if isinstance(out, torch.Tensor) and out.is_floating_point() else as_tensor(out, self.name)

    def _drop_leading_one(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape[:1] != (1,):
            raise ValueError(
                f'{self.name} with `evaluator="batched"` takes a leading axis of parameter sets and must return one '
                f"value each: for one set it returned the shape {tuple(value.shape)} where (1, ...) was expected."
            )
        return value[0]

    def _closed_over(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} closes over a tensor of an enclosing torch.func transform, which cannot reach the "
            "evaluations of an estimate: pass that tensor as an argument."
        )

    # ---------------------------------------------------------------------------------------------------- elsewhere

    def for_thread(self, fn: Callable[..., Any], arguments: Arguments) -> Objective:
        """Return this objective for another thread, with a function and arguments of its own."""
        own = copy.copy(self)
        own.__dict__.update(self._state())
        own.fn, own.arguments, own._others = fn, arguments, _requiring_grad(arguments)
        return own

    def _state(self) -> dict[str, Any]:
        away = self._away or _Surroundings.here(self)
        here = ("stream", "counted", "arrived", "sent", "_proof")
        parts = {"facts": copy.copy(self.facts), "_others": [], "_report": Report(), "_away": away}
        return {**self.__dict__, **dict.fromkeys(here), **parts}

    def __getstate__(self) -> dict[str, Any]:
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._others = _requiring_grad(self.arguments)


_NO_VALUES = torch.empty(0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class _Surroundings:
    """What holds where an estimate is made, for the evaluations that others make for it."""

    modes: Modes
    device: torch.device  # of the parameters
    depth: int

    @classmethod
    def here(cls, objective: Objective) -> _Surroundings:
        """Return those of this thread."""
        stream, device = objective.stream, objective.device
        return cls(Modes.here(device), device, 1 if stream is None else stream.depth)

    @contextlib.contextmanager
    def entered(self, objective: Objective, points: Points) -> Iterator[None]:
        """Let them hold for one answer, which says who gave it."""
        report = objective._report
        report.worker = worker_name()
        # First, since the directions of a worker that makes others are not worth an evaluation.
        if objective._proof is None:
            objective._proof = report.proof = proof(points)
        stream = FnStream(objective.seed, self.device, shared=objective.shared)
        with self.modes.entered(), stream:
            stream.depth = self.depth
            objective.stream = stream
            try:
                yield
            finally:
                objective.stream = None


def worker_name() -> str:
    """Return how errors call this process and thread."""
    return f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"


def proof(points: Points) -> tuple[str, bytes]:
    """Return what shows that two processes make the same points: torch's version and a digest of the first point."""
    return torch.__version__, Digest().add([leaf.detach() for leaf in points.first()]).result()


def all_finite(values: torch.Tensor) -> bool:
    """Return whether no value is nan or infinite."""
    # A sum is one operation where isfinite and all are two; only if it overflows is it not the answer.
    return math.isfinite(values if values.numel() == 1 else values.sum()) or bool(torch.isfinite(values).all())


def _lost(value: Value, rows: int | None) -> int:
    """Return how many of some points have a value that is not finite."""
    if isinstance(value, float):
        return int(not math.isfinite(value))
    finite = torch.isfinite(value)
    return int(not finite.all()) if rows is None else int((~finite.reshape(rows, -1).all(dim=1)).sum())


def _completed(kept: Value, value: Value, rows: int | None) -> Value:
    """Return the new values of points that failed before, the old ones of the others."""
    if rows is None or isinstance(kept, float) or isinstance(value, float):
        return value
    finite = torch.isfinite(kept).reshape(rows, -1).all(dim=1)
    return torch.where(finite.view(rows, *(1,) * (kept.dim() - 1)), kept, value)


def _requiring_grad(arguments: Arguments) -> list[torch.Tensor]:
    """Return the tensors among the other arguments that require grad."""
    chosen = set(arguments.chosen)
    others = enumerate(arguments.leaves)
    return [t for i, t in others if i not in chosen and isinstance(t, torch.Tensor) and t.requires_grad]


def as_tensor(out: Any, name: str) -> torch.Tensor:
    """What fn returned, as a tensor: of its own dtype, or torch's default one for a Python number.

    Args:
        out: what fn returned.
        name: how errors call fn.

    Returns:
        The tensor.

    Raises:
        TypeError: if it is not a number or an array of real floating-point numbers.
    """
    if not isinstance(out, torch.Tensor):
        return _from_number(out, name)
    if not out.is_floating_point():
        raise TypeError(
            f"{name} must return floating-point values to have a gradient, got a tensor of {out.dtype} with shape "
            f"{tuple(out.shape)}: return `{'.abs()` or `.real' if out.is_complex() else '.float()'}` of it."
        )
    return out


def _from_number(out: Any, name: str) -> torch.Tensor:
    # numpy's scalars and arrays, recognized by what they offer, so that numpy need not be imported. They come first,
    # since numpy's float64 is a Python float, too.
    if getattr(getattr(out, "dtype", None), "kind", "") in tuple("fiu"):
        return torch.as_tensor(float(out) if not out.shape else out.copy(), dtype=_numpy_dtype(out))
    if isinstance(out, (int, float)) and not isinstance(out, bool):
        return torch.tensor(out, dtype=torch.get_default_dtype())
    got = "None (is a `return` missing?)" if out is None else f"{type(out).__name__} {out!r:.80}"
    raise TypeError(f"{name} must return a tensor or a number, got {got}.")


def _numpy_dtype(out: Any) -> torch.dtype:
    return {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}.get(
        out.dtype.name, torch.get_default_dtype()
    )


def function_name(fn: Any) -> str:
    """How errors call a function."""
    return f"`{getattr(fn, '__qualname__', None) or type(fn).__qualname__}`"


class _NeedsGrad(BaseException):
    """fn is about to use autograd at a point that does not require grad; not for its own ``except Exception``."""


class _WatchAutograd(TorchFunctionMode):
    """Stops fn where it first uses autograd, before anything has happened that a second try would repeat.

    Without this, ``backward()`` on a loss of a point and of a tensor that does require grad would pass over the point,
    and an optimizer likewise: the value would be another than in a plain call, without any sign.
    """

    def __init__(self, params: Leaves) -> None:
        super().__init__()
        self._params = {id(p) for p in params}
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _WATCHED:
            # A torch.func transform inside fn brings its own tensors.
            engine = func in _ENGINE and not transforms_active()
            if engine or (func in _ASKING and id(args[0]) in self._params):
                self.seen = True
                raise _NeedsGrad
        return func(*args, **kwargs) if kwargs else func(*args)


_ENGINE = {torch.Tensor.backward, torch.autograd.grad}
_ASKING = {
    cast("Any", torch.Tensor.requires_grad).__get__,
    cast("Any", torch.Tensor.grad).__get__,
    torch.Tensor.register_hook,
    torch.Tensor.retain_grad,
}
_WATCHED = _ENGINE | _ASKING  # each operation of fn is looked up once


def wants_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument does not require grad."""
    return isinstance(error, _NeedsGrad) or any(sign in str(error) for sign in ("not require grad", "NoneType"))


def refuses_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument requires grad, which numpy will not have."""
    return "numpy() on Tensor that requires grad" in str(error)
