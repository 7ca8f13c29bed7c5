"""The one ``torch.autograd.Function``: estimates in forward, contracts saved numbers in backward.

``forward`` returns the value and what backward needs, as outputs, because only outputs survive every torch.func
transform: for an objective of one value (or one a slice) the gradient estimate; for others the coefficients and the
seed, from which backward replays the directions, so that no Jacobian is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from zograd._objective import Habits, Objective
from zograd._random import draw_seed
from zograd._tree import Arguments, Leaves, Space
from zograd.errors import SecondDerivativeError
from zograd.estimator import Estimate, Recipe, by_slice, check_gradient, contract, estimate, full_precision, weigh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd._points import Directions

__all__ = ["Plan", "Setup", "differentiate"]


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
    kept: list[Directions] = field(default_factory=list)  # those that cannot be replayed

    def estimate(self, tensors: Sequence[torch.Tensor], structure: Callable[[Leaves], Any] = tuple) -> Estimate:
        """Draw the seed and estimate."""
        setup, leaves = self.setup, self.arguments.leaves.copy()
        for k, position in setup.others:
            # Detached, so that what fn computes with it has no way into the caller's graph.
            leaves[position] = tensors[k].detach().requires_grad_() if tensors[k].requires_grad else tensors[k]
        params = tuple([tensors[i].detach() for i in setup.chosen])
        arguments = Arguments(self.arguments.form, leaves, self.arguments.chosen)
        objective = Objective(self.fn, arguments, params, self.habits)
        seed = draw_seed(setup.seed, setup.generator)
        return estimate(objective, setup.recipe, setup.space, seed, structure)

    def keep(self, directions: Directions) -> int:
        """A number by which backward finds the directions again: their seed, or a negative one for kept ones."""
        if directions.replayable:
            return directions.seed
        self.kept.append(directions)
        return -len(self.kept)

    def directions(self, number: int) -> Directions:
        """The directions that :meth:`keep` gave this number."""
        return self.kept[-number - 1] if number < 0 else self.setup.recipe.directions(self.setup.space, number)


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
        value: torch.Tensor = _ZeroOrder.apply(plan, *tensors)[0]  # type: ignore[no-untyped-call]
        return value
    # torch's own apply first binds the arguments to forward's signature, for defaults that it has not: a tenth of the
    # smallest estimate's time.
    return _past_binding(plan, *unwrap_dead_wrappers(tensors))[0]


class _ZeroOrder(torch.autograd.Function):
    @staticmethod
    def forward(plan: Plan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = plan.estimate(tensors)
        if result._flat is not None:
            return result.value, result._flat
        return result.value, result.coefficients, torch.tensor(plan.keep(result.directions))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.plan, ctx.inputs = inputs[0], len(inputs)
        ctx.set_materialize_grads(False)
        if len(output) > 2:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output[1:])
        if torch._C._are_functorch_transforms_active() or forward_mode():
            ctx.shape, ctx.dtype = output[0].shape, output[0].dtype
            ctx.save_for_forward(*output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
        grads: list[Any] = [None] * ctx.inputs
        if cotangent is not None:
            plan: Plan = ctx.plan
            space = plan.setup.space
            flat = _pull_back(plan, ctx.saved_tensors, cotangent)
            for i, leaf in zip(plan.setup.chosen, space.cast(space.split(flat)), strict=True):
                grads[1 + i] = leaf
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _plan: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        payload = ctx.saved_tensors
        columns = _push_forward(ctx.plan, payload, [tangents[i] for i in ctx.plan.setup.chosen])
        value = columns.reshape(ctx.shape).to(ctx.dtype)
        # Whoever uses the payload's tangent meets the fence first: see _Fence.
        return value, torch.zeros_like(payload[0]), *(None for _ in payload[1:])

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


def _pull_back(plan: Plan, payload: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> torch.Tensor:
    """Cotangent times Jacobian, flat."""
    payload, space = _fenced(payload), plan.setup.space
    if len(payload) > 1:
        return _apply(_Contract, plan, payload[1], payload[0], cotangent)
    if cotangent.dim() == 0:
        return payload[0] * cotangent
    weights = by_slice(cotangent.to(payload[0]), space, 0)
    return (payload[0].view(space.slices, space.dim) * weights).view(-1)


def _push_forward(plan: Plan, payload: tuple[torch.Tensor, ...], tangents: list[torch.Tensor | None]) -> torch.Tensor:
    """Jacobian times tangent, of the shape of the value."""
    space = plan.setup.space
    like = next((t for t in tangents if t is not None), payload[0])
    leaves = tuple(like.new_zeros(shape) if t is None else t for t, shape in zip(tangents, space.shapes, strict=True))
    payload, vector = _fenced(payload), space.join(leaves)
    if len(payload) > 1:
        return _apply(_Project, plan, payload[1], payload[0], vector)
    rows = payload[0].view(space.slices, space.dim) * vector.view(space.slices, space.dim)
    return rows.sum(dim=1)


def _fenced(payload: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The payload, so that a derivative of it is an error: without the fence it would be zero without a sign."""
    if torch.is_grad_enabled() or forward_mode():
        return _apply(_Fence, payload[0]), *payload[1:]
    return payload


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    out: torch.Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return out


class _Fence(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(payload: torch.Tensor) -> torch.Tensor:
        return payload.view_as(payload)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _no_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_second_derivative()


def _no_second_derivative() -> SecondDerivativeError:
    return SecondDerivativeError(
        "a second derivative was asked for (create_graph=True, or a nested torch.func transform), and an estimate has "
        "the first one only. If the outer derivative does not concern the decorated function, detach its gradient."
    )


class _Contract(torch.autograd.Function):
    """Coefficients and a cotangent to the flat gradient, the directions replayed."""

    @staticmethod
    def forward(plan: Plan, seed: torch.Tensor, coefficients: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        recipe, space = plan.setup.recipe, plan.setup.space
        flat = contract(plan.directions(int(seed)), recipe.sigma, weigh(coefficients, cotangent, space))
        # Under is_grads_batched torch vmaps backward itself, past our vmap below; nothing can be looked at there.
        if not torch._C._functorch.is_legacy_batchedtensor(flat):
            check_gradient(flat, cotangent)
        return flat

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.plan, seed, coefficients, cotangent = inputs
        ctx.save_for_backward(seed, coefficients, cotangent)
        ctx.save_for_forward(seed, coefficients)

    @staticmethod
    def backward(ctx: Any, vector: torch.Tensor) -> tuple[Any, ...]:
        seed, coefficients, cotangent = ctx.saved_tensors
        values = _apply(_Project, ctx.plan, seed, coefficients, vector)
        # The coefficients come through a fence, which raises if anything asks for the zero here.
        return None, None, torch.zeros_like(coefficients), values.to(cotangent.dtype)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        # Linear in the last argument; the coefficients come through a fence.
        seed, coefficients = ctx.saved_tensors[:2]
        return _apply(_Contract, ctx.plan, seed, coefficients, tangents[-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: torch.Tensor) -> tuple[Any, int]:
        return _each(_Contract, info.batch_size, in_dims, plan, tensors), 0


class _Project(torch.autograd.Function):
    """Coefficients and a flat tangent to a tangent of the value: the transpose of _Contract."""

    @staticmethod
    def forward(plan: Plan, seed: torch.Tensor, coefficients: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        directions, space = plan.directions(int(seed)), plan.setup.space
        leaves = zip(space.split(vector), plan.setup.recipe.sigma, strict=True)
        scaled = space.join(tuple(leaf / sigma for leaf, sigma in leaves))
        family = directions.distribution
        with full_precision(space.device):
            dots = [family.dot(space, directions.noise(lo, hi), scaled) for lo, hi in directions.blocks()]
        columns = by_slice(coefficients, space, 1)
        mean = (columns * torch.cat(dots).to(columns).unsqueeze(2)).mean(dim=0) * family.scale(space)
        return _from_slices(mean, coefficients.shape[1:], space)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.plan, seed, coefficients, _ = inputs
        ctx.save_for_backward(seed, coefficients)
        ctx.save_for_forward(seed, coefficients)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
        seed, coefficients = ctx.saved_tensors
        flat = _apply(_Contract, ctx.plan, seed, coefficients, cotangent)
        return None, None, torch.zeros_like(coefficients), flat

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        # Linear in the last argument; the coefficients come through a fence.
        seed, coefficients = ctx.saved_tensors[:2]
        return _apply(_Project, ctx.plan, seed, coefficients, tangents[-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], plan: Plan, *tensors: torch.Tensor) -> tuple[Any, int]:
        return _each(_Project, info.batch_size, in_dims, plan, tensors), 0


def _from_slices(columns: torch.Tensor, shape: torch.Size, space: Space) -> torch.Tensor:
    """(slices, outputs a slice) as the value's own shape."""
    if space.batch_dim is None:
        return columns.reshape(shape)
    rest = shape[: space.batch_dim] + shape[space.batch_dim + 1 :]
    return columns.reshape(space.slices, *rest).movedim(0, space.batch_dim)


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
