"""The function under examination: one value of the differentiated leaves, every evaluation counted."""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zograd._base.isolation import ModuleFunction
from zograd._base.streams import TorchStream, plain_call
from zograd._base.trees import Arguments, Space, flatten, sigma_per_leaf
from zograd.distributions.directions import Directions
from zograd.distributions.gaussian import Gaussian
from zograd.errors import ZeroOrderWarning
from zograd.estimate.estimate import estimate
from zograd.estimate.settings import Settings
from zograd.evaluators import Batched, Evaluator, Loop, Vmap
from zograd.evaluators.task.answer import Facts
from zograd.evaluators.task.objective import Objective
from zograd.evaluators.task.points import Points
from zograd.evaluators.task.returned import as_tensor, function_name
from zograd.func.inputs import refuse
from zograd.func.options import Options
from zograd.schemes import ANTITHETIC

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._base.trees import Leaves
    from zograd.distributions.base import Distribution
    from zograd.estimate.result import Estimate

_CALL = "check"


class OutOfBudgetError(Exception):
    """Error of an evaluation that would pass the budget, and was not begun."""


class GivenPoints(Points):
    """Points that are given themselves, a row of tensors each; the center is handed out and not copied.

    Args:
        params: the center.
        rows: the points, with a leading axis.
    """

    def __init__(self, params: Leaves, rows: Leaves) -> None:
        num = len(rows[0]) if rows else 1
        super().__init__(params, Directions(Gaussian(), Space.of(params), 0, num), (1.0,) * len(params), (1.0,))
        self._rows = rows

    def center(self) -> Leaves:
        """Return the center."""
        return self.params

    def point(self, i: Any, offset: float) -> Leaves:
        """Return a copy of point ``i``."""
        del offset
        return tuple([row[i].clone() for row in self._rows])

    def rows(self, lo: int, hi: int, offsets: tuple[float, ...]) -> Leaves:
        """Return the points ``lo`` to ``hi`` with a leading axis."""
        del offsets
        return tuple([row[lo:hi] for row in self._rows])


class Subject:
    """A function with its arguments, brought to one value: of several, the product with a fixed random cotangent.

    Args:
        given: a function, a decorated one or a module.
        args: its arguments.
        kwargs: likewise.
        argnums: what to differentiate, for a plain function.
        budget: evaluations that may be made.

    Attributes:
        sigma: the largest radius of a leaf as decorated, or None.
        unit: the radius of each leaf over the largest.
        family: the directions of estimates, those that it is decorated with if they are independent of each other.
        shape: of what ``fn`` returns, without the axis of parameter sets; None before the first call.
    """

    def __init__(
        self, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: tuple[int, ...], budget: int
    ) -> None:
        self.given = given
        fn, options, arguments = _taken_apart(given, args, kwargs, argnums)
        self.fn: Callable[..., Any] = fn
        self.options: Options | None = options
        self.name: str = function_name(self.fn)
        self.__qualname__ = self.name.strip("`")
        # With tensors and arrays of its own, so that the caller's are never written to.
        self.arguments: Arguments = replace(arguments, leaves=[_copied(leaf) for leaf in arguments.leaves])
        self.params: Leaves = tuple(p.detach().clone() for p in arguments.params())
        if not any(p.numel() for p in self.params):
            raise ValueError(
                f"`{_CALL}(fn, ...)`: no floating-point tensor to differentiate in the arguments of {self.name}: give "
                "`argnums`."
            )
        refuse(self.params, _CALL, argnums if options is None else options.argnums, None)
        self.space: Space = Space.of(self.params)
        radii = (1.0,) * len(self.params) if options is None else _radii(options, self.arguments)
        self.sigma: float | None = None if options is None else max(radii)
        self.unit: tuple[float, ...] = tuple(radius / max(radii) for radius in radii)
        self.family: Distribution = Gaussian()
        if options is not None and _measures(options.distribution, self.space):
            self.family = options.distribution
        self.batched: bool = options is not None and options.evaluator.batched
        self.vmapped: bool = False  # whether estimates may be vectorized
        self.budget = budget
        self.evaluations: int = 0
        self.facts: Facts = Facts()
        self.shape: torch.Size | None = None
        self.dtype: torch.dtype | None = None
        self.before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None  # sees what fn is about to get
        self._cotangent: torch.Tensor | None = None

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self.budget - self.evaluations

    def count(self, evaluations: int = 1, retries: int = 0, failures: int = 0) -> None:
        """Count evaluations, before they are made."""
        del retries, failures
        if evaluations > self.left:
            raise OutOfBudgetError
        self.evaluations += evaluations

    @property
    def size(self) -> float:
        """The typical size of a parameter; 1 if all are zero."""
        return math.sqrt(sum(float(p.double().square().sum()) for p in self.params) / self.space.size) or 1.0

    @property
    def beside(self) -> dict[str, Any]:
        """Objects that belong to the function and are none of its arguments, by name."""
        return {"the module": self.given} if isinstance(self.given, nn.Module) else {}

    def objective(self, *, judges: bool = True) -> Objective:
        """Return what evaluators and estimates take."""
        objective = Objective(self, self.arguments, self.params, self.facts, judges=judges)
        objective.counted = self.count
        return objective

    def value(self, params: Leaves | None = None, seed: int | None = None) -> float:
        """Return the value in one plain call; with ``seed`` torch's random stream begins there, else it goes on.

        ``params`` may be written to by ``fn``; without them it gets copies of its own.

        Returns:
            The value.
        """
        objective = self.objective(judges=False)
        point = GivenPoints(tuple(p.clone() for p in self.params) if params is None else params, ())

        def call() -> torch.Tensor:
            return objective.take_center(objective.center(point, batched=self.batched), point)[0]

        with torch.enable_grad():
            if seed is None:
                return plain_call(call, (), {}, rows=1).item()  # type: ignore[no-any-return]
            with TorchStream(self.space.device) as stream:
                stream.seed(seed)
                return plain_call(call, (), {}, rows=1).item()  # type: ignore[no-any-return]

    def estimate(self, sigma: float, num: int, seed: int) -> Estimate:
        """Estimate the gradient by ``num`` antithetic pairs, at a largest radius.

        Returns:
            The estimate.

        Raises:
            OutOfBudgetError: if that takes more evaluations than are left.
        """
        if 2 * num + 1 > self.left:
            raise OutOfBudgetError
        evaluator: Evaluator = Batched() if self.batched else Vmap() if self.vmapped else Loop()
        settings = Settings(self.family, ANTITHETIC, num, tuple(sigma * u for u in self.unit), evaluator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZeroOrderWarning)  # small radii are part of the question
            return estimate(self.objective(), settings, self.params, self.space, seed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of ``fn`` as one value (under ``"batched"`` one a parameter set)."""
        if self.before is not None:
            self.before(args, kwargs)
        given = self.fn(*args, **kwargs)
        out = as_tensor(given, self.name)
        if self.shape is None:
            self.shape, self.dtype = out.shape[1:] if self.batched else out.shape, _precision(given, out)
        if not self.shape:
            return given
        if self._cotangent is None:
            generator = torch.Generator().manual_seed(0)
            self._cotangent = torch.randn(self.shape, generator=generator, dtype=torch.float64).to(out.device)
        return (out.to(torch.float64) * self._cotangent).flatten(1 if self.batched else 0).sum(-1)


def _radii(options: Options, arguments: Arguments) -> tuple[float, ...]:
    return sigma_per_leaf(options.sigma, arguments, several=len(options.argnums) > 1)


def _measures(family: Distribution, space: Space) -> bool:
    """Return whether any number of these directions can be drawn again, each a sample of its own."""
    return family.independent and family.centered and family.replayable(space)


def _precision(given: Any, out: torch.Tensor) -> torch.dtype:
    """Return the dtype of a value. A Python float is a double, unless it came from a float32 tensor."""
    if not isinstance(given, float):
        return out.dtype
    return torch.float32 if float(torch.tensor(given, dtype=torch.float32)) == given else torch.float64


def _taken_apart(
    given: Any, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: tuple[int, ...]
) -> tuple[Callable[..., Any], Options | None, Arguments]:
    if isinstance(getattr(given, "zero_order_options", None), Options):  # a zeroth-order module
        trainable = given._trainable()
        given, args = given._function(trainable), (trainable, *args)
    if isinstance(getattr(given, "options", None), Options):
        arguments: Arguments = given._arguments(args, kwargs)
        return given.fn, given.options, arguments
    if isinstance(given, nn.Module):
        parameters = {name: p for name, p in given.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(f"`{_CALL}(fn)`: the module {type(given).__name__} has no trainable parameters.")
        fn = ModuleFunction(given, {id(p): name for name, p in parameters.items()})
        return fn, None, flatten((parameters, *args), kwargs, (0,))
    if not callable(given):
        raise TypeError(
            f"`{_CALL}(fn)` must be a function, a decorated one or a module, got {type(given).__name__} {given!r:.80}."
        )
    places = tuple(_place(given, a, args, kwargs) for a in argnums)
    return given, None, flatten(args, kwargs, places)


def _place(fn: Callable[..., Any], argnum: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    if 0 <= argnum < len(args):
        return argnum
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        names = []
    if 0 <= argnum < len(names) and names[argnum] in kwargs:
        return names[argnum]
    raise ValueError(
        f"`{_CALL}(argnums={argnum})` must index the arguments of {function_name(fn)}, got {len(args)} of them."
    )


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return leaf.copy() if type(leaf).__module__ == "numpy" and hasattr(leaf, "shape") else leaf
