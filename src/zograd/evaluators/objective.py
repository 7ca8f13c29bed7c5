"""The user's function as evaluators see it: a map from parameter leaves to float64 values."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch.overrides import TorchFunctionMode

from zograd._base.streams import CENTER, FnStream
from zograd.distributions.factored import dense
from zograd.errors import EvaluationError
from zograd.failures import dropping, is_failure, tries

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._base.trees import Arguments, Leaves
    from zograd.failures import Failures

Value: TypeAlias = "float | torch.Tensor"


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


@dataclass
class Habits:
    """What was learned about a function, kept from call to call."""

    differentiates: bool = False
    """Whether it uses autograd, maybe with respect to its differentiated arguments."""
    draws: bool = False
    """Whether it draws torch random numbers where many points are evaluated at once."""


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
            engine = func in _ENGINE and not torch._C._are_functorch_transforms_active()
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


class Objective:
    """``fn`` with everything but its differentiated leaves filled in.

    Evaluators call it at points; it sets the random state for each, checks what comes back and keeps a float64 copy,
    made before the next point is (an ``fn`` may return a view of its argument).

    Points require grad only if ``fn`` uses autograd itself. That shows at the center, which is watched for it, or when
    autograd complains; then that evaluation is repeated, and the habit remembered.

    Args:
        fn: the user's function. If it has ``at_center``, that is called for the center instead, and ``commit`` once the
            estimate is done: a module keeps the traces of the center's evaluation and of no other.
        arguments: the call, taken apart.
        params: the differentiated leaves, detached.
        habits: what earlier calls have shown.
        policy: what an evaluation that fails means; the value of one that is given up is not a number.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        arguments: Arguments,
        params: Leaves,
        habits: Habits,
        policy: Failures = "raise",
    ) -> None:
        self.params = params
        self.policy = policy
        self.failures: int = 0  # evaluations that failed and were dealt with by the policy
        self.stream: FnStream | None = None
        self.repeated: int = 0  # evaluations beyond one for each point, less those that a journal spared
        self.counted: Callable[..., None] | None = None  # told of evaluations as they begin, see `count`
        self.arrived: Callable[[int, int, Value], None] | None = None  # told of values as they come, by Evaluator
        self.parcel: Any = None  # what an evaluator sends to its workers, once an estimate
        self.value: torch.Tensor = params[0]  # the center's, as fn returned it
        self.shape: torch.Size = torch.Size()
        self._fn = fn
        self.arguments = arguments
        self._build = arguments.builder()
        chosen = set(arguments.chosen)
        others = enumerate(arguments.leaves)
        self._others = [t for i, t in others if i not in chosen and isinstance(t, torch.Tensor) and t.requires_grad]
        self.habits = habits

    @property
    def name(self) -> str:
        """How errors call the function."""
        return function_name(self._fn)

    @property
    def fn(self) -> Callable[..., Any]:
        """The user's function."""
        return self._fn

    def count(self, evaluations: int = 1, *, retries: int = 0, failures: int = 0) -> None:
        """Say that ``fn`` was evaluated, for who counts; an evaluator that has that done elsewhere says so itself."""
        if self.counted is not None:
            self.counted(evaluations, retries, failures)

    def recall(self, value: torch.Tensor) -> torch.Tensor:
        """Take the center's value as an earlier run had it, in place of an evaluation."""
        self.value, self.shape = value, value.shape
        return value.to(torch.float64, copy=True)

    def center(self, params: Leaves, *, batched: bool = False) -> torch.Tensor:
        """The value at the center, which tells the shape of all others."""
        if tries(self.policy) == 1:
            return self._at_center(params, batched=batched)
        out: torch.Tensor = self._with_policy(functools.partial(self._at_center, batched=batched), params, CENTER)
        return out

    def _at_center(self, params: Leaves, *, batched: bool) -> torch.Tensor:
        rows = range(CENTER, CENTER + 1) if batched else None
        out = self._evaluate(params, CENTER, rows, getattr(self._fn, "at_center", self._fn))
        value = self._as_tensor(out).detach()
        if batched:
            value = self._drop_leading_one(value)
        # Copies, since fn may have returned a view of its argument.
        exact = value.clone() if value.dtype == torch.float64 else value.double()
        if isinstance(out, (int, float)):
            exact.fill_(out)  # as exact as the values at the other points
        number = not isinstance(out, torch.Tensor) and any(p.dtype == torch.float64 for p in self.params)
        self.value, self.shape = exact.clone() if number else value.clone(), value.shape
        return exact

    def __call__(self, params: Leaves, index: int) -> Value:
        """The value at one point of direction ``index``: a float for scalars on the CPU, else a float64 tensor."""
        if self.policy == "raise":
            return self._at_point(params, index)
        return cast("Value", self._with_policy(functools.partial(self._at_point, index=index), params, index))

    def _at_point(self, params: Leaves, index: int) -> Value:
        try:
            out = self._evaluate(params, index, None, self._fn)
        except Exception as error:
            if is_failure(error):
                raise self._failed(error, index) from error
            raise
        if type(out) is float and not self.shape:
            return out
        out = self._as_tensor(out)
        if out.shape != self.shape:
            raise self._wrong_shape(out.shape, self.shape)
        if not self.shape and out.device.type == "cpu":
            return out.item()
        return out.detach().to(torch.float64, copy=True)

    def _as_tensor(self, out: Any) -> torch.Tensor:
        # Told the name only if it has something to say: that takes as long as all the rest.
        return out if isinstance(out, torch.Tensor) and out.is_floating_point() else as_tensor(out, self.name)

    def many(
        self,
        params: Leaves,
        lo: int,
        *,
        vmapped: bool,
        randomness: str = "error",
        point: Callable[[Leaves], Leaves] | None = None,
    ) -> torch.Tensor:
        """The values at many points, directions ``lo`` and on: ``params`` has a leading axis, and they a row each.

        With ``point`` the rows of ``params`` are what points are made of, inside the vectorized call.

        Returns:
            The values in float64.
        """
        evaluate = functools.partial(self._at_points, lo=lo, vmapped=vmapped, randomness=randomness, point=point)
        if self.policy == "raise":
            return evaluate(params)
        out: torch.Tensor = self._with_policy(evaluate, params, lo, rows=params[0].shape[0], vmapped=vmapped)
        return out

    def _at_points(
        self, params: Leaves, *, lo: int, vmapped: bool, randomness: str, point: Callable[[Leaves], Leaves] | None
    ) -> torch.Tensor:
        rows = params[0].shape[0]
        if vmapped:
            # The check for a tensor comes inside: vmap has its own words for anything else.
            def one(row: Leaves) -> torch.Tensor:
                return as_tensor(dense(self._call(self._fn, point(row) if point else row)), self.name)

            out: torch.Tensor = self._evaluate(params, lo, None, torch.vmap(one, randomness=randomness), vmapped=True)
        else:
            several = range(lo, lo + rows)
            try:
                made = self._evaluate(params, lo, several, self._fn)
            except Exception as error:
                if is_failure(error):
                    raise self._failed(error, lo, several) from error
                raise
            out = self._as_tensor(made)
        wanted = torch.Size((rows, *self.shape))
        if out.shape != wanted:
            raise self._wrong_shape(out.shape, wanted)
        return out.detach().to(torch.float64, copy=True)

    def _failed(self, error: Exception, index: int, rows: range | None = None) -> EvaluationError:
        where = f"direction {index}" if rows is None else f"directions {rows.start} to {rows.stop - 1}"
        seed = "" if self.stream is None else f" of the estimate with seed {self.stream.seed}"
        return EvaluationError(f"{self.name} raised {type(error).__name__} at {where}{seed}: {error}")

    def _with_policy(
        self,
        evaluate: Callable[[Leaves], Any],
        params: Leaves,
        index: int,
        *,
        rows: int | None = None,
        vmapped: bool = False,
    ) -> Any:
        """Evaluate one point, or many, as often as the policy says; what is left of them is not a number."""
        kept: Value | None = None
        for left in reversed(range(tries(self.policy))):
            try:  # on copies, since fn may write to its point before it fails
                value = evaluate(tuple(p.clone() for p in params) if left else params)
            except Exception as error:
                if vmapped or not is_failure(error) or not (left or self.may_drop(index)):
                    raise
                failed = rows or 1
            else:
                kept = value if kept is None else _completed(kept, value, rows)
                if not _lost(kept, rows) or not (left or self.may_drop(index)):
                    return kept
                failed = _lost(value, rows)
            self.fail(failed, again=(rows or 1) if left else 0)
        return self.lost(rows) if kept is None else kept

    def may_drop(self, index: int) -> bool:
        """Whether the policy lets this direction go; the center is not one."""
        return index != CENTER and dropping(self.policy) is not None

    def fail(self, failures: int, again: int = 0) -> None:
        """Count evaluations that failed and were dealt with, and how many are now done again."""
        self.failures += failures
        self.repeated += again
        self.count(0, retries=again, failures=failures)

    def lost(self, rows: int | None = None) -> Value:
        """What stands for the value of a point that was given up."""
        if rows is None and not self.shape:
            return math.nan
        shape = self.shape if rows is None else (rows, *self.shape)
        return torch.full(shape, math.nan, dtype=torch.float64, device=self.params[0].device)

    def commit(self) -> None:
        """The estimate is done: the center's traces may stay."""
        commit(self._fn)

    def _evaluate(
        self, params: Leaves, index: int, rows: range | None, fn: Callable[..., Any], *, vmapped: bool = False
    ) -> Any:
        run = fn if vmapped else functools.partial(self._call, fn)
        self._begin(index, rows, vmapped=vmapped)
        if self.counted is not None:
            self.count(params[0].shape[0] if vmapped or rows else 1)
        if self.habits.differentiates:
            return self._run_tracked(run, params, index, rows, vmapped=vmapped)
        versions = _versions(params)
        watch = _WatchAutograd(params) if index == CENTER else None
        try:
            if watch is None:
                return run(params)
            with watch:
                out = run(params)
            if not watch.seen:
                return out
        except (RuntimeError, TypeError, _NeedsGrad) as error:
            if "escaped" in str(error):
                raise self._closed_over() from error
            if not wants_grad(error) or (versions != _versions(params) and index != CENTER):
                raise
        if versions != _versions(params):  # the center: make it anew
            params = tuple(p.clone().view_as(q) for p, q in zip(self.params, params, strict=True))
        self._begin_again(params, index, rows, vmapped=vmapped)
        out = self._run_tracked(run, params, index, rows, vmapped=vmapped)
        self.habits.differentiates = True  # only now: the complaint may have been about something else
        return out

    def _run_tracked(
        self, run: Callable[[Leaves], Any], params: Leaves, index: int, rows: range | None, *, vmapped: bool
    ) -> Any:
        if vmapped:
            raise RuntimeError(
                f'{self.name} uses autograd itself, which `evaluator="vmap"` cannot follow for many points at once: '
                'use `evaluator="loop"`.'
            )
        try:
            return run(tuple(leaf.requires_grad_() for leaf in params))
        except RuntimeError as error:
            if not refuses_grad(error):
                raise
        # It uses autograd in some calls, and numpy in this one.
        self._begin_again(params, index, rows, vmapped=vmapped)
        return run(tuple(leaf.detach() for leaf in params))

    def _call(self, fn: Callable[..., Any], params: Leaves) -> Any:
        for leaf in self._others:
            leaf.grad = None  # what an earlier evaluation may have left there
        args, kwargs = self._build(params)
        return fn(*args, **kwargs)

    def _begin(self, index: int, rows: range | None, *, vmapped: bool) -> None:
        if self.stream is not None:
            self.stream.at(index, rows, vmapped=vmapped)

    def _begin_again(self, params: Leaves, index: int, rows: range | None, *, vmapped: bool) -> None:
        points = params[0].shape[0] if vmapped or rows else 1
        self.repeated += points
        self.count(points)
        self._begin(index, rows, vmapped=vmapped)

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

    def _wrong_shape(self, got: torch.Size, wanted: torch.Size) -> ValueError:
        return ValueError(f"{self.name} must return one shape at all points, got {tuple(got)} after {tuple(wanted)}.")


def _lost(value: Value, rows: int | None) -> int:
    """How many of some points have a value that is not finite."""
    if isinstance(value, float):
        return int(not math.isfinite(value))
    finite = torch.isfinite(value.detach())
    return int(not finite.all()) if rows is None else int((~finite.reshape(rows, -1).all(dim=1)).sum())


def _completed(kept: Value, value: Value, rows: int | None) -> Value:
    """The new values of points that failed before, the old ones of the others."""
    if rows is None or isinstance(kept, float) or isinstance(value, float):
        return value
    finite = torch.isfinite(kept).reshape(rows, -1).all(dim=1)
    return torch.where(finite.view(rows, *(1,) * (kept.dim() - 1)), kept, value)


def _versions(params: Leaves) -> list[int]:
    return [-1 if p.is_inference() else p._version for p in params]


def commit(fn: Callable[..., Any]) -> None:
    """Let a function that keeps traces of its center (see :class:`Objective`) keep them."""
    keep = getattr(fn, "commit", None)
    if keep is not None:
        keep()


def wants_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument does not require grad."""
    return isinstance(error, _NeedsGrad) or any(sign in str(error) for sign in ("not require grad", "NoneType"))


def refuses_grad(error: BaseException) -> bool:
    """Whether fn failed since a differentiated argument requires grad, which numpy will not have."""
    return "numpy() on Tensor that requires grad" in str(error)
