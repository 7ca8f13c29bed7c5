"""The one ``torch.autograd.Function``: estimates in forward, contracts saved numbers in backward.

``forward`` returns the value and what backward needs, as outputs, because only outputs survive every torch.func
transform: for an objective of one value (or one a slice) the gradient estimate; for others the coefficients, from which
backward replays the directions, so that no Jacobian is ever stored. Both are outputs with derivatives of their own,
made from the same values, which is how second derivatives come about.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from zograd._base.streams import draw_seed
from zograd._base.trees import Arguments, Space
from zograd.distributions.directions import Directions
from zograd.distributions.sums import by_slice, contract, from_slices, project, weigh
from zograd.errors import SecondDerivativeError
from zograd.estimate.checks import check_gradient
from zograd.estimate.estimate import estimate
from zograd.estimate.evidence import Evidence
from zograd.estimate.result import Estimate
from zograd.estimate.second_order import by_direction, identity_term, refused
from zograd.estimate.settings import Recipe
from zograd.evaluators.objective import Habits, Objective
from zograd.tracking import Tally, watched

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Setup:
    """All that calls share which look alike: same structure, shapes and dtypes."""

    positions: tuple[int, ...]  # where the tensors are, among the leaves
    chosen: tuple[int, ...]  # which of the tensors are differentiated
    others: tuple[tuple[int, int], ...]  # which are not, and where they are
    recipe: Recipe
    space: Space
    lost: torch.Size | None  # the shape of a tensor that requires grad and gets none
    seed: int | None
    generator: torch.Generator | None


@dataclass(slots=True)
class Plan:
    """One call of a decorated function without its tensors, which autograd has to see as inputs."""

    setup: Setup
    fn: Callable[..., Any]
    arguments: Arguments  # tensors replaced by None
    habits: Habits
    depth: int = 0  # of torch.func transforms; under them a tensor tells which estimate a derivative is of
    kept: list[tuple[int | Directions, Evidence]] = field(default_factory=list)  # of each; a seed if it will do

    def estimate(self, tensors: Sequence[torch.Tensor], structure: Callable[[Sequence[Any]], Any] = tuple) -> Estimate:
        """Draw the seed and estimate."""
        setup, leaves = self.setup, self.arguments.leaves.copy()
        for k, position in setup.others:
            # Detached, so that what fn computes with it has no way into the caller's graph.
            leaves[position] = tensors[k].detach().requires_grad_() if tensors[k].requires_grad else tensors[k]
        params = tuple([tensors[i].detach() for i in setup.chosen])
        arguments = Arguments(self.arguments.form, self.arguments.spec, leaves, self.arguments.chosen)
        objective = Objective(self.fn, arguments, params, self.habits, setup.recipe.failures)
        if not watched():  # the smallest estimate has no time to lose
            return self._estimate(objective, structure)
        with Tally(objective.name, setup.recipe.evaluations) as tally:
            objective.counted = tally.count
            result = self._estimate(objective, structure)
            value, flat = result.value, result._flat
            tally.finish(
                result.seed,
                value.item() if value.numel() == 1 else None,
                None if flat is None else flat.norm().item(),
                evaluations=result.evaluations,
                failures=result.failures,
            )
        return result

    def _estimate(self, objective: Objective, structure: Callable[[Sequence[Any]], Any]) -> Estimate:
        setup = self.setup
        seed = draw_seed(setup.seed, setup.generator)  # after the budget was asked: an error must not cost a draw
        with _may_draw():
            return estimate(objective, setup.recipe, setup.space, seed, structure)

    def keep(self, result: Estimate) -> int:
        """A number by which backward finds the directions and values again; no parameters, and no gradient."""
        directions = result.directions
        again = directions.replayable and self.setup.recipe.until is None
        self.kept.append((directions.seed if again else directions, result._evidence))
        return len(self.kept) - 1

    def directions(self, number: int) -> Directions:
        """The directions of an estimate."""
        found = self.kept[number][0]
        return found if isinstance(found, Directions) else self.setup.recipe.directions(self.setup.space, found)

    def differences(self, number: int) -> torch.Tensor:
        """The second differences of an estimate."""
        return self.kept[number][1].differences(self.directions(number))


def _may_draw() -> contextlib.AbstractContextManager[None]:
    """Lets random numbers be drawn inside ``torch.autograd``'s own vmap, which knows no instances of us."""
    torch._C._vmapmode_increment_nesting()
    levels = torch._C._vmapmode_decrement_nesting()
    return _outside(levels) if levels else _NOTHING


@contextlib.contextmanager
def _outside(levels: int) -> Iterator[None]:
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(levels):
            torch._C._vmapmode_increment_nesting()


_unpack_dual: Callable[[torch.Tensor], Any] = forward_ad.unpack_dual


def forward_mode() -> bool:
    """Whether forward-mode differentiation is going on, which neither grad mode nor ``requires_grad`` tells."""
    return bool(forward_ad._current_level >= 0)


def is_transformed(leaf: object) -> bool:
    """Whether the tensor belongs to a torch.func transform."""
    return isinstance(leaf, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)


def is_tracked(leaf: torch.Tensor) -> bool:
    """Whether someone may ask for the derivative in this tensor."""
    if leaf.requires_grad or is_transformed(leaf):
        return True
    return forward_mode() and _unpack_dual(leaf).tangent is not None


def differentiate(plan: Plan, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The value of ``fn``, with the estimate behind it for autograd."""
    if torch._C._are_functorch_transforms_active():
        plan.depth = _depth()
        value: torch.Tensor = _ZeroOrder.apply(plan, *tensors)[0]  # type: ignore[no-untyped-call]
        return value
    # torch's own apply first binds the arguments to forward's signature, for defaults that it has not: a tenth of the
    # smallest estimate's time.
    return _past_binding(plan, *unwrap_dead_wrappers(tensors))[0]


class _ZeroOrder(torch.autograd.Function):
    @staticmethod
    def forward(plan: Plan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = plan.estimate(tensors)
        number = plan.keep(result)
        payload = result.coefficients if result._flat is None else result._flat
        return (result.value, payload, torch.tensor(number)) if plan.depth else (result.value, payload)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.plan, ctx.inputs = inputs[0], len(inputs)
        ctx.set_materialize_grads(False)
        if len(output) > 2:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output[1:])
        if inputs[0].depth or forward_mode():
            ctx.shape, ctx.dtype = output[0].shape, output[0].dtype
            ctx.save_for_forward(*output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor | None, *others: torch.Tensor | None) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        grads: list[Any] = [None] * ctx.inputs
        payload, space = _Payload(plan, *ctx.saved_tensors), plan.setup.space
        parts = [] if cotangent is None else [payload.pull_back(cotangent)]
        if others[0] is not None:  # someone differentiates the payload, that is, the gradient
            parts.append(payload.curve(others[0]))
        if parts:
            flat = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            for i, leaf in zip(plan.setup.chosen, space.cast(space.split(flat)), strict=True):
                grads[1 + i] = leaf
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _plan: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        plan: Plan = ctx.plan
        payload = _Payload(plan, *ctx.saved_tensors)
        # torch switches forward mode off in here, and an outer derivative with it: it would be zero without a sign.
        with forward_ad._set_fwd_grad_enabled(True):
            vector = payload.join([tangents[i] for i in plan.setup.chosen])
            value = payload.push_forward(vector).reshape(ctx.shape).to(ctx.dtype)
            # The innermost derivative is one of the value. Without transforms it is backward that may want another.
            wanted = _depth() < plan.depth if plan.depth else any(ctx.needs_input_grad)
            tangent = payload.tangent(vector) if wanted else torch.zeros_like(payload.main)
        return value, tangent, *(None for _ in ctx.saved_tensors[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: torch.Tensor) -> tuple[Any, Any]:
        def instance(b: int) -> list[torch.Tensor]:
            return [t if dim is None else t.select(dim, b) for t, dim in zip(tensors, in_dims[1:], strict=True)]

        # One estimate an instance, a seed each, below the transform: fn may be numpy and may draw.
        outs = [_ZeroOrder.apply(plan, *instance(b)) for b in range(info.batch_size)]  # type: ignore[no-untyped-call]
        stacked = tuple(torch.stack(column) for column in zip(*outs, strict=True))
        return stacked, (0,) * len(stacked)


# Not through torch.autograd.Function.apply: see differentiate.
_past_binding: Callable[..., tuple[torch.Tensor, ...]] = super(torch.autograd.Function, _ZeroOrder).apply


class _Payload:
    """What an estimate leaves for autograd, and the derivatives of its value and of itself made from that.

    Args:
        plan: the call.
        main: the flat gradient of an objective of one value a slice, or else the coefficients (N, *out).
        number: which estimate of the plan.
    """

    def __init__(self, plan: Plan, main: torch.Tensor, number: torch.Tensor | None = None) -> None:
        self.plan = plan
        self.space = plan.setup.space
        self.main = main
        self.scalar = main.dim() == 1
        self._number = number

    @property
    def refusal(self) -> str | None:
        """Why the payload has no derivative, or None if it has one."""
        return self.plan.setup.recipe.no_curvature(scalar=self.scalar)

    def pull_back(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Cotangent times Jacobian, flat."""
        main, space = self._guarded(), self.space
        if not self.scalar:
            return self._sum(weigh(main, cotangent, space))
        if cotangent.dim() == 0:
            return main * cotangent
        weights = by_slice(cotangent.to(main), space, 0)
        return (main.view(space.slices, space.dim) * weights).view(-1)

    def push_forward(self, vector: torch.Tensor) -> torch.Tensor:
        """Jacobian times tangent."""
        main, space = self._guarded(), self.space
        if self.scalar:
            return (main.view(space.slices, space.dim) * vector.view(space.slices, space.dim)).sum(dim=1)
        columns = (by_slice(main, space, 1) * self._project(vector).unsqueeze(2)).sum(dim=0)
        return from_slices(columns, main.shape[1:], space, 0)

    def curve(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Cotangent times the derivative of the payload, flat: the Hessian's product with it."""
        h = self._differences()
        num = h.shape[0]
        if not self.scalar:
            rows = by_slice(cotangent, self.space, 1) * by_slice(h, self.space, 1)
            return self._sum(rows.sum(dim=2) * num)
        rows = by_direction(h, self.space)
        flat = self._sum(rows * self._project(cotangent) * num)
        return flat - identity_term(self.space, self.plan.setup.recipe.sigma, rows, cotangent)

    def tangent(self, vector: torch.Tensor) -> torch.Tensor:
        """The derivative of the payload along a tangent."""
        if self.refusal:
            return torch.zeros_like(self.main)  # whoever uses it meets the guard first
        if self.scalar:
            return self.curve(vector)
        dots = self._project(vector)
        dots = dots * dots.shape[0]
        rows = by_slice(self._differences(), self.space, 1) * dots.unsqueeze(2)
        return from_slices(rows, self.main.shape[1:], self.space, 1)

    def join(self, tangents: list[torch.Tensor | None]) -> torch.Tensor:
        """The tangents of the leaves as one vector, zero where there is none."""
        like, shapes = next((t for t in tangents if t is not None), self.main), self.space.shapes
        leaves = (like.new_zeros(shape) if t is None else t for t, shape in zip(tangents, shapes, strict=True))
        return self.space.join(tuple(leaves))

    def _guarded(self) -> torch.Tensor:
        """The payload, so that a derivative that it has not is an error: without the guard it would be zero."""
        if (torch.is_grad_enabled() or forward_mode()) and (reason := self.refusal):
            return _apply(_Guard, refused(reason), self.main, self.main)
        return self.main

    @functools.cached_property
    def number(self) -> torch.Tensor:
        """Which estimate of the plan."""
        return torch.tensor(0) if self._number is None else self._number

    def _differences(self) -> torch.Tensor:
        """The second differences; their own derivative, a third one, is an error."""
        if self.refusal:
            raise SecondDerivativeError(refused(self.refusal))
        h = _apply(_Differences, self.plan, self.number, self.main.detach())
        return _apply(_Guard, _NO_THIRD, h, self.main)

    def _sum(self, weights: torch.Tensor) -> torch.Tensor:
        return _apply(_Contract, self.plan, self.number, weights)

    def _project(self, vector: torch.Tensor) -> torch.Tensor:
        return _apply(_Project, self.plan, self.number, vector)


_NO_THIRD = "a third derivative was asked for, and an estimate has the first two only."


def _depth() -> int:
    """How many torch.func transforms are around."""
    return len(torch._C._functorch.get_interpreter_stack() or ())


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    out: torch.Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


class _Guard(torch.autograd.Function):
    """The first tensor, with an error for a derivative in the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(reason: str, values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.reason = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise SecondDerivativeError(ctx.reason)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise SecondDerivativeError(ctx.reason)


class _Differences(torch.autograd.Function):
    """The second differences of an estimate, a constant; beside the payload, so that vmap sees its instances."""

    @staticmethod
    def forward(plan: Plan, number: torch.Tensor, main: torch.Tensor) -> torch.Tensor:
        return plan.differences(int(number))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: torch.Tensor) -> tuple[Any, int]:
        if plan.setup.recipe.until is not None and info.batch_size > 1:
            raise SecondDerivativeError(
                refused("under vmap `Until` takes another number of directions for each instance: give a number")
            )
        return _each(_Differences, info.batch_size, in_dims, plan, tensors), 0


class _Contract(torch.autograd.Function):
    """Weights (N, slices) to the flat mean of the directions, which are replayed."""

    @staticmethod
    def forward(plan: Plan, number: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with _may_draw():
            flat = contract(plan.directions(int(number)), plan.setup.recipe.sigma, weights)
        # Under is_grads_batched torch vmaps backward itself, past our vmap below; nothing can be looked at there.
        if not torch._C._functorch.is_legacy_batchedtensor(flat):
            check_gradient(flat, weights)
        return flat

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.plan, number, weights = inputs
        ctx.dtype = weights.dtype
        ctx.save_for_backward(number)
        ctx.save_for_forward(number)

    @staticmethod
    def backward(ctx: Any, vector: torch.Tensor) -> tuple[Any, ...]:
        return None, None, _apply(_Project, ctx.plan, *ctx.saved_tensors, vector).to(ctx.dtype)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        return _apply(_Contract, ctx.plan, *ctx.saved_tensors, tangents[-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: torch.Tensor) -> tuple[Any, int]:
        return _each(_Contract, info.batch_size, in_dims, plan, tensors), 0


class _Project(torch.autograd.Function):
    """The transpose of _Contract: a flat vector to its products with the directions, (N, slices)."""

    @staticmethod
    def forward(plan: Plan, number: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        with _may_draw():
            return project(plan.directions(int(number)), plan.setup.recipe.sigma, vector)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.plan, number, _ = inputs
        ctx.save_for_backward(number)
        ctx.save_for_forward(number)

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[Any, ...]:
        return None, None, _apply(_Contract, ctx.plan, *ctx.saved_tensors, weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        return _apply(_Project, ctx.plan, *ctx.saved_tensors, tangents[-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: torch.Tensor) -> tuple[Any, int]:
        return _each(_Project, info.batch_size, in_dims, plan, tensors), 0


def _each(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[Any, ...],
    plan: Plan,
    tensors: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    dims = in_dims[1:]
    rows = ([t if d is None else t.select(d, b) for t, d in zip(tensors, dims, strict=True)] for b in range(size))
    return torch.stack([_apply(function, plan, *row) for row in rows])
