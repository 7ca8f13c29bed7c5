"""The one ``torch.autograd.Function``: estimates in forward, contracts saved numbers in backward.

``forward`` returns the value and what backward needs, as outputs, because only outputs survive every torch.func
transform: for an objective of one value (or one a slice) the gradient estimate; for others the coefficients, from which
backward replays the directions, so that no Jacobian is ever stored. Both are outputs with derivatives of their own,
made from the same values, which is how second derivatives come about.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from zograd._base.torch_private import (
    forward_mode_active,
    forward_mode_enabled,
    is_legacy_batched,
    is_transformed,
    random_allowed,
    transform_depth,
    transforms_active,
)
from zograd._base.trees import Space, by_slice, from_slices, one_per_slice, weigh
from zograd.distributions.directions import contract, project
from zograd.errors import SecondDerivativeError
from zograd.estimate.result import Estimate
from zograd.estimate.second_order import hessian_product, refused
from zograd.estimate.settings import check_gradient

Make = Callable[[Sequence[torch.Tensor]], Estimate]


def attach(make: Make, tensors: Sequence[torch.Tensor], chosen: Sequence[int]) -> torch.Tensor:
    """Return an estimate's value, with the estimate behind it for autograd.

    Args:
        make: makes the estimate of the tensors. It is called below torch.func transforms, once for each instance of a
            vmap; it may hand out one that is there already, where there are no transforms.
        tensors: all tensors that the value depends on.
        chosen: which of them get a gradient, in the order of the estimate's leaves.

    Returns:
        The value.
    """
    depth = transform_depth() if transforms_active() else 0
    value: torch.Tensor = _ZeroOrder.apply(_Call(make, tuple(chosen), depth), *tensors)[0]  # type: ignore[no-untyped-call]
    return value


_unpack_dual: Callable[[torch.Tensor], Any] = forward_ad.unpack_dual


def is_tracked(leaf: torch.Tensor) -> bool:
    """Return whether someone may ask for the derivative in this tensor."""
    if leaf.requires_grad or is_transformed(leaf):
        return True
    return forward_mode_active() and _unpack_dual(leaf).tangent is not None


@dataclass(slots=True)
class _Call:
    """One call of a function without its tensors, which autograd has to see as inputs."""

    make: Make
    chosen: tuple[int, ...]
    depth: int  # of torch.func transforms; under them a tensor tells which estimate a derivative is of
    made: list[Estimate] = field(default_factory=list)
    space: Space = field(init=False)  # the layout of the leaves

    def estimate(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make an estimate, and keep it without its gradient, which autograd holds.

        Returns:
            The value, and what backward contracts.
        """
        with random_allowed():
            made = self.make(tensors)
        self.space = made.directions.space
        kept = Estimate.__new__(Estimate)  # with the gradient it would hold what holds it, and `replace` costs 5 us
        kept.__dict__.update(made.__dict__, flat=None)
        self.made.append(kept)
        return made.value, made.coefficients if made.flat is None else made.flat


class _ZeroOrder(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, main = call.estimate(tensors)
        return (value, main, torch.tensor(len(call.made) - 1)) if call.depth else (value, main)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.call, ctx.inputs = inputs[0], len(inputs)
        ctx.set_materialize_grads(False)
        if len(output) > 2:
            ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output[1:])
        if inputs[0].depth or forward_mode_active():
            ctx.shape, ctx.dtype = output[0].shape, output[0].dtype
            ctx.save_for_forward(*output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor | None, *others: torch.Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        grads: list[Any] = [None] * ctx.inputs
        payload, space = _Payload(call, *ctx.saved_tensors), call.space
        parts = [] if cotangent is None else [payload.pull_back(cotangent)]
        if others[0] is not None:  # someone differentiates the payload, that is, the gradient
            parts.append(payload.curve(others[0]))
        if parts:
            flat = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            for i, leaf in zip(call.chosen, space.cast(space.split(flat)), strict=True):
                grads[1 + i] = leaf
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        payload = _Payload(call, *ctx.saved_tensors)
        # torch switches forward mode off in here, and an outer derivative with it: it would be zero without a sign.
        with forward_mode_enabled():
            vector = payload.join([tangents[i] for i in call.chosen])
            value = payload.push_forward(vector).reshape(ctx.shape).to(ctx.dtype)
            # The innermost derivative is one of the value. Without transforms it is backward that may want another.
            wanted = transform_depth() < call.depth if call.depth else any(ctx.needs_input_grad)
            tangent = payload.tangent(vector) if wanted else torch.zeros_like(payload.main)
        return value, tangent, *(None for _ in ctx.saved_tensors[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: torch.Tensor) -> tuple[Any, Any]:
        def instance(b: int) -> list[torch.Tensor]:
            return [t if dim is None else t.select(dim, b) for t, dim in zip(tensors, in_dims[1:], strict=True)]

        # One estimate an instance, a seed each, below the transform: fn may be numpy and may draw.
        outs = [_ZeroOrder.apply(call, *instance(b)) for b in range(info.batch_size)]  # type: ignore[no-untyped-call]
        stacked = tuple(torch.stack(column) for column in zip(*outs, strict=True))
        return stacked, (0,) * len(stacked)


class _Bound:
    """Arguments that are bound as they stand."""

    __slots__ = ("args", "kwargs")

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.kwargs: dict[str, Any] = {}

    def apply_defaults(self) -> None:
        """Add nothing: there are no defaults."""


class _Positional(inspect.Signature):
    """The signature of a function that takes positional arguments and has no defaults."""

    def bind(self, *args: Any) -> Any:
        """Return them as they stand."""
        return _Bound(args)


# torch looks up the signature of `forward` and binds the arguments to it in each call, 12 us of an estimate of 190. It
# reads `args` and `kwargs` of what `bind` returns; the tests of autograd fail at once if a release reads more.
_ZeroOrder.forward.__signature__ = _Positional()  # type: ignore[attr-defined]


@dataclass
class _Payload:
    """What an estimate leaves for autograd, and the derivatives of its value and of itself made from that.

    Args:
        call: the call.
        main: the flat gradient of an objective of one value a slice, or else the coefficients (N, *out).
        number: which estimate of the call.
    """

    call: _Call
    main: torch.Tensor
    _number: torch.Tensor | None = None

    @property
    def no_second(self) -> str | None:
        """Why the payload has no derivative, or None if it has one."""
        return self.call.made[0].settings.no_second(scalar=self.main.dim() == 1)

    def pull_back(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Return cotangent times Jacobian, flat."""
        main, space = self._guarded(), self.call.space
        if main.dim() > 1:
            return self._sum(weigh(main, cotangent, space))
        if cotangent.dim() == 0:
            return main * cotangent
        weights = by_slice(cotangent.to(main), space, 0)
        return (main.view(space.slices, space.dim) * weights).view(-1)

    def push_forward(self, vector: torch.Tensor) -> torch.Tensor:
        """Return Jacobian times tangent."""
        main, space = self._guarded(), self.call.space
        if self.main.dim() == 1:
            return (main.view(space.slices, space.dim) * vector.view(space.slices, space.dim)).sum(dim=1)
        columns = (by_slice(main, space, 1) * self._project(vector).unsqueeze(2)).sum(dim=0)
        return from_slices(columns, main.shape[1:], space, 0)

    def curve(self, cotangent: torch.Tensor) -> torch.Tensor:
        """Return cotangent times the derivative of the payload, flat: the Hessian's product with it."""
        h, space = self._differences(), self.call.space
        if self.main.dim() > 1:
            rows = by_slice(cotangent, space, 1) * by_slice(h, space, 1)
            return self._sum(rows.sum(dim=2) * h.shape[0])
        sigma = self.call.made[0].sigma
        return hessian_product(space, sigma, one_per_slice(h, space), cotangent, self._sum, self._project)

    def tangent(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the derivative of the payload along a tangent."""
        if self.no_second:
            return torch.zeros_like(self.main)  # whoever uses it meets the guard first
        if self.main.dim() == 1:
            return self.curve(vector)
        dots = self._project(vector)
        dots = dots * dots.shape[0]
        rows = by_slice(self._differences(), self.call.space, 1) * dots.unsqueeze(2)
        return from_slices(rows, self.main.shape[1:], self.call.space, 1)

    def join(self, tangents: list[torch.Tensor | None]) -> torch.Tensor:
        """Return the tangents of the leaves as one vector, zero where there is none."""
        like, shapes = next((t for t in tangents if t is not None), self.main), self.call.space.shapes
        leaves = (like.new_zeros(shape) if t is None else t for t, shape in zip(tangents, shapes, strict=True))
        return self.call.space.join(tuple(leaves))

    def _guarded(self) -> torch.Tensor:
        """Return the payload, so that a derivative that it has not is an error: else it would be zero."""
        if (torch.is_grad_enabled() or forward_mode_active()) and (reason := self.no_second):
            return _apply(_Guard, refused(reason), self.main, self.main)
        return self.main

    @functools.cached_property
    def number(self) -> torch.Tensor:
        """Which estimate of the call."""
        return torch.tensor(0) if self._number is None else self._number

    def _differences(self) -> torch.Tensor:
        """Return the second differences; their own derivative, a third one, is an error."""
        if self.no_second:
            raise SecondDerivativeError(refused(self.no_second))
        h = _apply(_Differences, self.call, self.number, self.main.detach())
        return _apply(_Guard, _NO_THIRD, h, self.main)

    def _sum(self, weights: torch.Tensor) -> torch.Tensor:
        return _apply(_Contract, self.call, self.number, weights)

    def _project(self, vector: torch.Tensor) -> torch.Tensor:
        return _apply(_Project, self.call, self.number, vector)


_NO_THIRD = "a third derivative was asked for, and an estimate has the first two only."


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
    def forward(call: _Call, number: torch.Tensor, main: torch.Tensor) -> torch.Tensor:
        return call.made[int(number)].differences()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: torch.Tensor) -> tuple[Any, int]:
        if call.made[0].settings.until is not None and info.batch_size > 1:
            raise SecondDerivativeError(
                refused("under vmap `Until` takes another number of directions for each instance: give a number")
            )
        return _each(_Differences, info.batch_size, in_dims, call, tensors), 0


class _Contract(torch.autograd.Function):
    """Weights (N, slices) to the flat mean of the directions, which are replayed."""

    @staticmethod
    def forward(call: _Call, number: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        made = call.made[int(number)]
        with random_allowed():
            flat = contract(made.directions.again(), made.sigma, weights)
        # Under is_grads_batched torch vmaps backward itself, past our vmap below; nothing can be looked at there.
        if not is_legacy_batched(flat):
            check_gradient(flat, weights)
        return flat

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.call, number, weights = inputs
        ctx.dtype = weights.dtype
        ctx.save_for_backward(number)
        ctx.save_for_forward(number)

    @staticmethod
    def backward(ctx: Any, vector: torch.Tensor) -> tuple[Any, ...]:
        return None, None, _apply(_Project, ctx.call, *ctx.saved_tensors, vector).to(ctx.dtype)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        return _apply(_Contract, ctx.call, *ctx.saved_tensors, tangents[-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: torch.Tensor) -> tuple[Any, int]:
        return _each(_Contract, info.batch_size, in_dims, call, tensors), 0


class _Project(torch.autograd.Function):
    """The transpose of _Contract: a flat vector to its products with the directions, (N, slices)."""

    @staticmethod
    def forward(call: _Call, number: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        made = call.made[int(number)]
        with random_allowed():
            return project(made.directions.again(), made.sigma, vector)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.call, number, _ = inputs
        ctx.save_for_backward(number)
        ctx.save_for_forward(number)

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[Any, ...]:
        return None, None, _apply(_Contract, ctx.call, *ctx.saved_tensors, weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        return _apply(_Project, ctx.call, *ctx.saved_tensors, tangents[-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: torch.Tensor) -> tuple[Any, int]:
        return _each(_Project, info.batch_size, in_dims, call, tensors), 0


def _each(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[Any, ...],
    call: _Call,
    tensors: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    dims = in_dims[1:]
    rows = ([t if d is None else t.select(d, b) for t, d in zip(tensors, dims, strict=True)] for b in range(size))
    return torch.stack([_apply(function, call, *row) for row in rows])
