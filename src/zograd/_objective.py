"""The user's function as evaluators see it: a map from parameter leaves to float64 values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from zograd._random import CENTER, FnStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._tree import Arguments, Leaves

__all__ = ["Objective", "Value", "as_tensor"]

Value: TypeAlias = "float | torch.Tensor"


def as_tensor(out: Any, name: str) -> torch.Tensor:  # noqa: ANN401 - whatever fn returned
    """What fn returned, as a tensor: of its own dtype, or torch's default one for a Python number.

    Raises:
        TypeError: if it is not a number or an array of real floating-point numbers.
    """
    if not isinstance(out, torch.Tensor):
        return _from_number(out, name)
    if not out.is_floating_point():
        raise TypeError(
            f"{name} must return floating-point values to have a gradient, got a tensor of {out.dtype} with shape "
            f"{tuple(out.shape)}: return `.float()` of it."
        )
    return out


def _from_number(out: Any, name: str) -> torch.Tensor:  # noqa: ANN401
    if isinstance(out, (int, float)) and not isinstance(out, bool):
        return torch.tensor(out, dtype=torch.get_default_dtype())
    # numpy's scalars and arrays, recognized by what they offer, so that numpy need not be imported.
    if getattr(getattr(out, "dtype", None), "kind", "") in tuple("fiu"):
        return torch.as_tensor(float(out) if not out.shape else out.copy(), dtype=_numpy_dtype(out))
    raise TypeError(f"{name} must return a tensor or a number, got {type(out).__name__} {out!r:.80}.")


def _numpy_dtype(out: Any) -> torch.dtype:  # noqa: ANN401
    return {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}.get(
        out.dtype.name, torch.get_default_dtype()
    )


def function_name(fn: Any) -> str:  # noqa: ANN401 - any callable
    """How errors call a function."""
    return f"`{getattr(fn, '__qualname__', None) or type(fn).__qualname__}`"


class Objective:
    """``fn`` with everything but its differentiated leaves filled in.

    Evaluators call it at points; it sets the random state for each, checks what comes back and keeps a float64 copy, made
    before the next point is (an ``fn`` may return a view of its argument).

    Args:
        fn: the user's function. If it has an ``at_center`` attribute, that is called for the center instead: a module
            evaluates the center on itself and the other points on replicas.
        arguments: the call, taken apart.
        params: the differentiated leaves, detached.
        requires_grad: whether each of them requires grad in a plain call.
    """

    def __init__(self, fn: Callable[..., Any], arguments: Arguments, params: Leaves, requires_grad: tuple[bool, ...]) -> None:
        self.name = function_name(fn)
        self.params = params
        self.stream: FnStream | None = None
        self.dtype = torch.float64
        self.device = params[0].device
        self.shape = torch.Size()
        self._fn = fn
        self._build = arguments.builder()
        self._requires_grad = requires_grad
        self._differentiates = False  # whether fn asks autograd for derivatives in its own arguments

    def center(self, params: Leaves, *, batched: bool = False) -> torch.Tensor:
        """The value at the center, which tells the shape and dtype of all others."""
        self._at(CENTER, range(CENTER, CENTER + 1) if batched else None)
        for leaf in self._tracked(params):
            leaf.requires_grad_().register_hook(self._note_differentiation)
        value = as_tensor(self._run(params, getattr(self._fn, "at_center", self._fn)), self.name).detach()
        if batched:
            value = self._drop_leading_one(value)
        self.dtype, self.device, self.shape = value.dtype, value.device, value.shape
        return value.to(torch.float64, copy=True)

    def __call__(self, params: Leaves, index: int) -> Value:
        """The value at one point of direction ``index``: a float for scalars on the CPU, else a float64 tensor."""
        self._at(index)
        if self._differentiates:
            for leaf in self._tracked(params):
                leaf.requires_grad_()
        out = self._run(params, self._fn)
        if type(out) is not torch.Tensor or not out.is_floating_point():
            if type(out) is float and not self.shape:
                return out
            out = as_tensor(out, self.name)
        if out.shape != self.shape:
            raise self._wrong_shape(out.shape, self.shape)
        if not self.shape and out.device.type == "cpu":
            return out.item()
        return out.detach().to(torch.float64, copy=True)

    def many(self, params: Leaves, lo: int, hi: int, *, vmapped: bool, randomness: str = "error") -> torch.Tensor:
        """The values at many points at once, ``params`` having a leading axis: one float64 row a point."""
        self._at(lo, None if vmapped else range(lo, hi))
        if self._differentiates:
            for leaf in self._tracked(params):
                leaf.requires_grad_()
        if vmapped:
            assert self.stream is not None  # noqa: S101 - set by the estimator before any evaluation
            self.stream.vmapped = True
            try:
                out = torch.vmap(self._checked_run, randomness=randomness)(params)
            finally:
                self.stream.vmapped = False
        else:
            out = as_tensor(self._run(params, self._fn), self.name)
        wanted = torch.Size((hi - lo, *self.shape))
        if out.shape != wanted:
            raise self._wrong_shape(out.shape, wanted)
        return out.detach().to(torch.float64, copy=True)

    def _checked_run(self, params: Leaves) -> torch.Tensor:
        return as_tensor(self._run(params, self._fn), self.name)

    def _at(self, index: int, rows: range | None = None) -> None:
        if self.stream is not None:
            self.stream.at(index, rows)

    def _run(self, params: Leaves, fn: Callable[..., Any]) -> Any:  # noqa: ANN401
        args, kwargs = self._build(params)
        return fn(*args, **kwargs)

    def _tracked(self, params: Leaves) -> list[torch.Tensor]:
        return [leaf for leaf, tracked in zip(params, self._requires_grad, strict=True) if tracked]

    def _note_differentiation(self, _grad: torch.Tensor) -> None:
        self._differentiates = True

    def _drop_leading_one(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape[:1] != (1,):
            raise ValueError(
                f'{self.name} with `evaluator="batched"` takes a leading axis of parameter sets and must return one value '
                f"each: for one set it returned the shape {tuple(value.shape)} where (1, ...) was expected."
            )
        return value[0]

    def _wrong_shape(self, got: torch.Size, wanted: torch.Size) -> ValueError:
        return ValueError(f"{self.name} must return one shape at all points, got {tuple(got)} after {tuple(wanted)}.")
