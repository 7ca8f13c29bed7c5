"""The user's function as evaluators see it: a map from points to float64 values, which judges its failures."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import nn

from zograd._base.execution import Modes
from zograd._base.isolation import ModuleFunction
from zograd._base.streams import CENTER, FnStream
from zograd._base.torch_private import own_code, transforms_active, unwatch_engine, watch_engine
from zograd.errors import EvaluationError, WorkerError
from zograd.evaluators.task.answer import Answer, Facts, Proof, Report
from zograd.evaluators.task.copies import private
from zograd.evaluators.task.elsewhere import Home, worker_name
from zograd.evaluators.task.failed import center_not_finite, not_finite, repeated
from zograd.evaluators.task.returned import as_tensor, function_name
from zograd.failures import RAISE, Policy, is_failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd._base.trees import Arguments, Leaves
    from zograd.evaluators.task.points import Points

# One number of fn is a float: 200 of them are a tensor after 36 us, where 200 tensors are stacked in 430.
Value: TypeAlias = "float | torch.Tensor"
How: TypeAlias = "Callable[[Objective, Points, int, int], torch.Tensor]"
"""How an evaluator calls ``fn`` at the points of some directions; returns their values, (directions, offsets, *out)."""

V = TypeVar("V", float, torch.Tensor, "float | torch.Tensor")

_NO_VALUES = torch.empty(0, dtype=torch.float64, device="cpu")
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
        module: ``fn``, if it is a module's: then its center is evaluated at home, for the traces that it leaves.
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
        policy: Policy = RAISE,
        *,
        judges: bool = True,
    ) -> None:
        self.fn = fn
        self.module: ModuleFunction | None = fn if isinstance(fn, ModuleFunction) else None
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
        self._dtype = torch.float64  # of the center's value, as fn returned it
        self._double = any(p.dtype == torch.float64 for p in params)
        self._others = _requiring_grad(arguments)
        self._report = Report(facts=facts, counted=True)
        self._thread = threading.get_ident()
        self._home: Home | None = None  # what holds there, where the objective is not at home
        self._proof: Proof | None = None
        self._threads: dict[int, Objective] = {}  # that other threads evaluate

    @property
    def name(self) -> str:
        """How errors call the function."""
        return function_name(self.fn)

    # ------------------------------------------------------------------------------------------------ one estimate

    def estimating(self, seed: int, *, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Hold the random state of an estimate; at its end the center's traces stay.

        Args:
            seed: the estimate's.
            shared: whether all points see the center's random numbers.

        Returns:
            A context.
        """
        self.seed, self.shared = seed, shared
        return _Estimating(self)

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
        if not answer.report.counted:
            self.merge(answer.report, points)
        if answer.error is not None:
            try:
                raise answer.error
            finally:
                del answer  # which holds the error, whose traceback holds this frame
        return answer.values if answer.values.device == self.device else answer.values.to(self.device)

    def take_center(self, answer: Answer, points: Points) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the center's answer, which tells the shape of all values.

        Args:
            answer: of the center.
            points: where.

        Returns:
            The value in float64, and as ``fn`` returned it.
        """
        self.device = answer.device or answer.values.device
        exact = self.take(answer, points)
        self.shape = exact.shape
        return exact, exact.clone() if answer.dtype == torch.float64 else exact.to(answer.dtype)

    def merge(self, report: Report, points: Points, typed: str = "the evaluator") -> None:
        """Add up what a worker's evaluations cost and showed, once.

        Args:
            report: of an answer.
            points: where; they tell whether a worker holds the same ones.
            typed: how errors call the evaluator.

        Raises:
            DeterminismError: if a worker has another torch or makes other points.
        """
        if report.counted:
            return
        report.counted = True
        self.facts.learn(report.facts)
        if self.module is not None:
            self.module.read |= report.read
        if report.worker is not None:
            self.count(report.evaluations, report.retries, report.failures)
        if report.proof is not None:
            self._proof = self._proof or Proof.of(points)
            self._proof.compare(report.proof, report.worker, typed)

    def unread(self) -> tuple[tuple[int, ...], list[str]]:
        """Return the leaves that no evaluation has read, by number and by name: known of modules alone."""
        if self.module is None:
            return (), []
        found = [(i, name) for i, name in enumerate(self.module.names) if name not in self.module.read]
        return tuple(i for i, _ in found), [name for _, name in found]

    def count(self, evaluations: int, retries: int = 0, failures: int = 0) -> None:
        """Add evaluations up, and tell who counts them; those of a call that came to nothing are taken off again."""
        self.evaluations += evaluations
        self.failures += failures
        if self.counted is not None:
            self.counted(evaluations, retries, failures)

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
        if self._home is None and threading.get_ident() != self._thread:  # an engine of threads: nothing may be shared
            return self._in_this_thread().evaluate(points.copy(), lo, hi, how)
        try:
            with _NOTHING if self._home is None else self._elsewhere(self._home, points):
                if how is None:
                    values, accepted = self._one_by_one(points, lo, hi)
                else:
                    values = how(self, points, lo, hi)
                    accepted = not self.judges or self.policy.drop is not None or all_finite(values)
                if accepted:
                    return Answer(values, self._report)
                return Answer(_NO_VALUES, self._report, not_finite(values, points.offsets, lo, self.name))
        except (Exception, SystemExit) as error:
            return self._without_values(error)

    def center(self, points: Points, *, batched: bool = False) -> Answer:
        """Evaluate the parameters themselves, in one plain call.

        Args:
            points: those of the estimate.
            batched: whether ``fn`` takes a leading axis of parameter sets, here of length one.

        Returns:
            The value, of the shape of all others, with a report.
        """
        try:
            with _NOTHING if self._home is None else self._elsewhere(self._home, points):
                if self.policy.tries > 1:
                    once = functools.partial(self._at_center, points, batched=batched)
                    exact: torch.Tensor = self._tried(once, CENTER)
                else:
                    exact = self._at_center(points, batched=batched)
                self.judge_center(exact)
                return Answer(exact, self._report, dtype=self._dtype)
        except (Exception, SystemExit) as error:
            return self._without_values(error)

    def _without_values(self, error: Exception | SystemExit) -> Answer:
        if isinstance(error, SystemExit):
            if self._home is None:
                raise error
            ended = WorkerError(f"{self.name} called `sys.exit({error.code!r})` in a worker.")
            ended.__cause__ = error
            error = ended
        return Answer(_NO_VALUES, self._report, error)

    def together(
        self, call: Callable[[Any], Any], make: Callable[[], Any], lo: int, num: int, *, vmapped: bool = False
    ) -> torch.Tensor:
        """Return the values of one call for many points.

        Args:
            call: takes the points, or what stands for them, with a leading axis.
            make: makes these.
            lo: the first direction.
            num: how many points there are.
            vmapped: whether the call is torch.vmap's: then what ``fn`` raises goes up as it is.

        Returns:
            float64 values of shape (num, *out).
        """
        rows, wanted = None if vmapped else range(lo, lo + num), torch.Size((num, *self.shape))

        def evaluate() -> torch.Tensor:
            try:
                out = self._run(call, make(), make, lo, rows, num if vmapped else 0)
            except Exception as error:
                if vmapped or not is_failure(error):
                    raise
                raise self._failed(error, f"directions {lo} to {lo + num - 1}") from error
            value = as_tensor(out, self.name)
            if value.shape != wanted:
                raise self._wrong_shape(value.shape, wanted)
            return value.detach().to(torch.float64, copy=True)

        if self.policy.tries == 1 and self.policy.drop is None:
            return evaluate()
        return self._tried(evaluate, lo, num, raises=vmapped)

    # ------------------------------------------------------------------------------------------------- evaluations

    def _at_center(self, points: Points, *, batched: bool) -> torch.Tensor:
        make, rows = points.center, None
        if batched:
            make, rows = functools.partial(_with_leading_one, points), range(CENTER, CENTER + 1)
        fn = self.fn if self.module is None else self.module.at_center
        out = self._run(functools.partial(self.arguments.call, fn), make(), make, CENTER, rows)
        is_value = isinstance(out, torch.Tensor) and out.is_floating_point()
        value = (out if is_value else as_tensor(out, self.name)).detach()
        if batched:
            value = self._drop_leading_one(value)
        # A copy, since fn may have returned a view of its argument.
        exact = value.clone() if value.dtype == torch.float64 else value.double()
        if isinstance(out, (int, float)):
            exact.fill_(out)  # as exact as the values at the other points
        number = not isinstance(out, torch.Tensor) and self._double
        self._dtype = torch.float64 if number else value.dtype
        return exact

    def _one_by_one(self, points: Points, lo: int, hi: int) -> tuple[torch.Tensor, bool]:
        """Return the values at the points of directions ``lo`` to ``hi``, one call each, and whether they are accepted.

        The last direction is the first that is not.
        """
        sides, values, accepted = len(points.offsets), [], True
        call = functools.partial(self.arguments.call, self.fn)
        plain = self.policy.tries == 1 and self.policy.drop is None
        judges = self.judges and self.policy.drop is None
        made = points.each(lo, hi)
        for number in range(lo * sides, hi * sides):
            if plain:
                value = self._value(call, points, number, next(made))  # of which nothing is left when the next is made
            else:  # each try at a point of its own, since fn may write to it before it fails
                once = functools.partial(self._value, call, points, number, None)
                value = self._tried(once, number // sides)
            values.append(value)
            if self.arrived is not None:
                self.arrived(number, torch.as_tensor(value, dtype=torch.float64))
            if judges:
                accepted = accepted and (math.isfinite(value) if isinstance(value, float) else all_finite(value))
                if not accepted and not (number + 1) % sides:
                    break
        if not self.shape and isinstance(values[0], float):
            return torch.tensor(values, dtype=torch.float64, device="cpu").view(-1, sides), accepted
        rows = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
        return rows.view(len(values) // sides, sides, *self.shape), accepted

    def _value(self, call: Callable[[Leaves], Any], points: Points, number: int, point: Leaves | None) -> Value:
        """Return the value at one point: a float for one number on the CPU, else a float64 tensor."""
        index, again = number // len(points.offsets), functools.partial(points.__getitem__, number)
        try:
            out = self._run(call, again() if point is None else point, again, index)
        except Exception as error:
            if is_failure(error):
                raise self._failed(error, f"direction {index}") from error
            raise
        if type(out) is float and not self.shape:
            return out
        if not (isinstance(out, torch.Tensor) and out.is_floating_point()):
            out = as_tensor(out, self.name)
        if out.shape != self.shape:
            raise self._wrong_shape(out.shape, self.shape)
        if not self.shape and out.device.type == "cpu":
            return cast("float", out.item())
        return out.detach().to(torch.float64, copy=True)

    # ---------------------------------------------------------------------------------------------------- judgement

    def judge_center(self, exact: torch.Tensor) -> None:
        """Raise NonFiniteError if the center's value is not finite."""
        if self.judges and not all_finite(exact):
            raise center_not_finite(exact, self.name)

    def _tried(self, evaluate: Callable[[], V], index: int, rows: int | None = None, *, raises: bool = False) -> V:
        """Evaluate as often as the policy says, see :func:`repeated`; what is given up is nan."""

        def count(retries: int, failures: int) -> None:
            self._report.retries += retries
            self._report.failures += failures
            self.count(0, retries, failures)

        value = repeated(evaluate, self.policy, rows, drops=index != CENTER, raises=raises, count=count)
        return self._given_up(rows) if value is None else value  # type: ignore[return-value]

    def _given_up(self, rows: int | None) -> Value:
        if rows is None and not self.shape:
            return math.nan
        shape = self.shape if rows is None else (rows, *self.shape)
        return torch.full(shape, math.nan, dtype=torch.float64, device=self.device)

    def give_up(self, index: int, error: Exception, tried: int) -> Answer | None:
        """Judge an evaluation that a worker did not survive, or did not end in time.

        Args:
            index: the direction.
            error: what became of the evaluation.
            tried: how often it has been tried before.

        Returns:
            None if it is to be tried again; else an answer that gives it up, or has the error.
        """
        if tried + 1 < self.policy.tries:
            self.count(1, 1, 1)
            return None
        report = Report(1, worker="")  # it did begin
        if index == CENTER or self.policy.drop is None:
            return Answer(_NO_VALUES, report, error)
        report.failures = 1
        lost = torch.full((1, 1, *self.shape), math.nan, dtype=torch.float64, device="cpu")
        return Answer(lost, report)

    def _failed(self, error: Exception, where: str) -> EvaluationError:
        seed = "" if self.stream is None else f" of the estimate with seed {self.stream.seed}"
        return EvaluationError(f"{self.name} raised {type(error).__name__} at {where}{seed}: {error}")

    def _wrong_shape(self, got: torch.Size, wanted: torch.Size) -> ValueError:
        return ValueError(f"{self.name} must return one shape at all points, got {tuple(got)} after {tuple(wanted)}.")

    def _drop_leading_one(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape[:1] != (1,):
            raise ValueError(
                f'{self.name} with `evaluator="batched"` takes a leading axis of parameter sets and must return one '
                f"value each: for one set it returned the shape {tuple(value.shape)} where (1, ...) was expected."
            )
        return value[0]

    # ------------------------------------------------------------------------------------------------- calls of fn

    def _run(
        self,
        call: Callable[[Any], Any],
        params: Any,
        again: Callable[[], Any],
        index: int,
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
            watch = _WatchAutograd(params, leaves=self.module is None)
            try:
                out = call(params)
            finally:
                watch.end()
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
        call: Callable[[Any], Any],
        params: Any,
        again: Callable[[], Any],
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
        for leaf in self._others:
            leaf.grad = None  # what an earlier evaluation may have left there
        num = vmapped or (1 if rows is None else len(rows))
        self._report.evaluations += num
        self.evaluations += num
        if self.counted is not None:
            self.counted(num, 0, 0)

    def _closed_over(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} closes over a tensor of an enclosing torch.func transform, which cannot reach the "
            "evaluations of an estimate: pass that tensor as an argument."
        )

    # ---------------------------------------------------------------------------------------------------- elsewhere

    def for_thread(self, fn: Callable[..., Any], arguments: Arguments) -> Objective:
        """Return this objective for another thread, with a function and arguments of its own."""
        own = copy.copy(self)
        own.__dict__.update(self.__getstate__())
        own.fn, own.arguments, own._others = fn, arguments, _requiring_grad(arguments)
        own.module = fn if isinstance(fn, ModuleFunction) else None
        return own

    def of_thread(self) -> Objective:
        """Return this objective for the thread that asks, whose function shares no module with that of another."""
        thread = threading.get_ident()
        if thread not in self._threads:
            fn, leaves = self.fn, self.arguments.leaves
            if threading.current_thread() is not threading.main_thread():
                fn, leaves = private(fn, leaves)
            self._threads[thread] = self.for_thread(fn, replace(self.arguments, leaves=leaves))
        return self._threads[thread]

    def _in_this_thread(self) -> Objective:
        own = self.of_thread()
        own.facts, own.shape = copy.copy(self.facts), self.shape
        own._proof = own._proof or Proof("", b"")  # of the same process
        return own

    @contextlib.contextmanager
    def _elsewhere(self, home: Home, points: Points) -> Iterator[None]:
        """Let hold what holds at home, for one answer, which says who gave it."""
        self._report = Report(facts=self.facts, worker=worker_name())
        # First, since the directions of a worker that makes others are not worth an evaluation.
        if self._proof is None:
            self._proof = self._report.proof = Proof.of(points)
        with home.held(self.seed, shared=self.shared) as self.stream:
            try:
                yield
            finally:
                self.stream = None
                if self.module is not None:
                    self._report.read = frozenset(self.module.read)

    def __getstate__(self) -> dict[str, Any]:
        home = self._home or Home(Modes.here(self.device), self.device, 1 if self.stream is None else self.stream.depth)
        here = ("stream", "counted", "arrived", "_proof")
        parts = {"facts": copy.copy(self.facts), "_others": [], "_report": Report(), "_home": home, "_threads": {}}
        return {**self.__dict__, **dict.fromkeys(here), **parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._others = _requiring_grad(self.arguments)


class _Estimating(contextlib.AbstractContextManager[None]):
    """The random state and the grad mode of an estimate, held."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._stream = FnStream(objective.seed, objective.device, shared=objective.shared)
        self._grad = torch.enable_grad()

    def __enter__(self) -> None:
        if self._objective.module is not None:
            self._objective.module.begin()
        self._stream.__enter__()
        self._objective.stream = self._stream
        self._grad.__enter__()  # user code needs it, whoever calls us: an inner training loop is the main use

    def __exit__(self, *error: Any) -> None:
        self._grad.__exit__(*error)
        self._objective.stream = None
        self._stream.__exit__(*error)
        if self._objective.module is not None:
            self._objective.module.end(commit=error[0] is None)


def all_finite(values: torch.Tensor) -> bool:
    """Return whether no value is nan or infinite."""
    # A sum is one operation where isfinite and all are two; only if it overflows is it not the answer.
    return math.isfinite(values if values.numel() == 1 else values.sum()) or bool(torch.isfinite(values).all())


def _with_leading_one(points: Points) -> Leaves:
    return tuple([leaf.unsqueeze(0) for leaf in points.center()])


def _requiring_grad(arguments: Arguments) -> list[torch.Tensor]:
    """Return the tensors among the other arguments that require grad."""
    if len(arguments.chosen) == len(arguments.leaves):
        return []
    chosen = set(arguments.chosen)
    others = enumerate(arguments.leaves)
    return [t for i, t in others if i not in chosen and isinstance(t, torch.Tensor) and t.requires_grad]


class _NeedsGrad(BaseException):
    """fn is about to use autograd at a point that does not require grad; not for its own ``except Exception``."""


class _WatchAutograd:
    """Stops fn where it first uses autograd, before anything has happened that a second try would repeat.

    Without this, ``backward()`` on a loss of a point and of a tensor that does require grad would pass over the point,
    and an optimizer likewise: the value would be another than in a plain call, without any sign. It is no mode of
    torch's, under which fused encoders take another path than at the other points.

    Args:
        params: the point.
        leaves: whether a question about a tensor's gradient counts, too; a module's parameters answer it themselves.
    """

    def __init__(self, params: Leaves, *, leaves: bool) -> None:
        self.seen = False
        self._params = [leaf for leaf in params if type(leaf) is torch.Tensor] if leaves else []
        for leaf in self._params:
            leaf.__class__ = _WatchedLeaf
            leaf.notify = self._notify  # type: ignore[attr-defined]
        self._outer = watch_engine(self._used)

    def end(self) -> None:
        """Watch no longer."""
        unwatch_engine(self._outer)
        for leaf in self._params:
            leaf.__class__ = torch.Tensor
            del leaf.notify  # type: ignore[attr-defined]

    def _used(self) -> None:
        if not transforms_active():  # one inside fn brings its own tensors
            self._notify()

    def _notify(self) -> None:
        self.seen = True
        raise _NeedsGrad


class _WatchedLeaf(torch.Tensor):
    """A tensor that tells of questions about its gradient, and is otherwise like any other."""

    __torch_function__ = nn.Parameter.__torch_function__  # none: torch takes the path that it takes for plain tensors
    notify: Callable[[], None]

    @property
    def requires_grad(self) -> bool:
        _notified(self)
        return _plain(self).requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override]
        _notified(self)
        return None

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        _notified(self)
        return super().register_hook(hook)  # type: ignore[no-untyped-call]

    def retain_grad(self) -> None:
        _notified(self)
        super().retain_grad()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copied = self.detach().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(_plain(self))


def _notified(leaf: _WatchedLeaf) -> None:
    scope = sys._getframe(2).f_globals
    if not own_code(scope) and not scope.get("__name__", "").startswith("zograd."):  # an estimate inside fn
        leaf.notify()


def _plain(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.as_subclass(torch.Tensor)


def wants_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument does not require grad."""
    return isinstance(error, _NeedsGrad) or any(sign in str(error) for sign in ("not require grad", "NoneType"))


def refuses_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument requires grad, which numpy will not have."""
    return "numpy() on Tensor that requires grad" in str(error)
