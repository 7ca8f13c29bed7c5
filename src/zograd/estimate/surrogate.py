r"""A differentiable approximation of ``fn`` as a control variate.

.. code-block:: text

    A_i = coeff_i(f) eps_i / sigma                               what the estimate is the mean of
    B_i = sum_j w_j c_j grad h(theta + sigma c_j eps_i) - coeff_i(h) eps_i / sigma      of mean zero, for any h
    gradient = mean_i (A_i + a B_i)

By Stein's identity both terms of B have the same mean, whatever h is, so that the estimate keeps its own for any factor
a that does not depend on the directions it is used with: each half of the directions gets the one fitted on the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from zograd._base.streams import CENTER
from zograd.errors import NonFiniteError
from zograd.estimate.statistics import ErrorBars, Groups
from zograd.evaluators.base import default_chunk
from zograd.evaluators.task.returned import function_name
from zograd.evaluators.vmap import Vmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zograd._base.trees import Leaves, Space
    from zograd.distributions.base import Distribution
    from zograd.evaluators.base import Evaluator
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping


def no_surrogate(distribution: Distribution, shaping: Shaping | None, batch_dim: int | None) -> str | None:
    """Why these settings can have no surrogate, or None if they can."""
    if not distribution.gaussian_marginals:
        return f"Stein's identity needs Gaussian marginals, which {distribution} has not: use `Gaussian()`"
    if shaping is not None:
        return "a shaping changes what is estimated, and the surrogate's part would not follow: use `shaping=None`"
    if batch_dim is not None:
        return f"it is for one value, not for one a slice: got batch_dim={batch_dim}"
    return None


class Surrogate:
    """The approximation, evaluated with its gradient at the points of an estimate.

    Args:
        h: the approximation; it takes what ``fn`` takes.
        objective: ``fn``, for its arguments and its random state: h sees the random numbers that ``fn`` saw.
        points: where.
        evaluator: how ``fn`` was called: h is vectorized like it.
    """

    def __init__(self, h: Callable[..., Any], objective: Objective, points: Points, evaluator: Evaluator) -> None:
        self._h = h
        self._points = points
        self._space = points.directions.space
        self._vmapped = isinstance(evaluator, Vmap)
        self._batched = evaluator.batched
        self._build = objective.arguments.build
        self._stream = objective.stream
        self._typed = f"`zero_order(surrogate={function_name(h).strip('`')})`"

    def center(self) -> float:
        """Its value at the parameters."""
        params = self._points.center()
        if self._batched:
            return float(self._at(tuple(p.unsqueeze(0) for p in params), CENTER, rows=1)[0])
        return float(self._at(params, CENTER)[0])

    def spans(self) -> Iterator[tuple[int, torch.Tensor, list[torch.Tensor]]]:
        """Values and gradients at the points of some directions at a time.

        Yields:
            The first direction; values, float64 of shape (directions, sides); and for each side the gradients, of shape
            (directions, size), in the compute dtype.
        """
        points = self._points
        many = self._vmapped or self._batched
        for lo, hi in points.spans(default_chunk(points) if many else points.directions.block, 0, None):
            if many:
                sides = [self._at(points.rows(lo, hi, (side,)), lo, rows=hi - lo) for side in points.offsets]
            else:
                sides = self._one_by_one(lo, hi)
            yield lo, torch.stack([values for values, _ in sides], dim=1), [gradients for _, gradients in sides]

    def _one_by_one(self, lo: int, hi: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sides = len(self._points.offsets)
        rows = [self._at(point, lo + k // sides) for k, point in enumerate(self._points.each(lo, hi))]
        columns = [rows[j::sides] for j in range(sides)]
        return [tuple(map(torch.cat, zip(*column, strict=True))) for column in columns]  # type: ignore[misc]

    def _at(self, params: Leaves, index: int, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and gradients, a row each, at a point or at many of which ``params`` has a row each."""
        params = tuple(p.detach().requires_grad_() for p in params)
        vmapped = rows is not None and self._vmapped
        if self._stream is not None:
            self._stream.at(index, range(index, index + (rows or 1)) if self._batched else None, vmapped=vmapped)
        out = torch.vmap(self._call, randomness="different")(params) if vmapped else self._call(params)
        self._check(out, () if rows is None else (rows,))
        leaves = torch.autograd.grad(out.sum(), params, allow_unused=True)
        filled = [torch.zeros_like(p) if leaf is None else leaf for p, leaf in zip(params, leaves, strict=True)]
        flat = torch.cat([leaf.reshape(rows or 1, -1).to(self._space.dtype) for leaf in filled], dim=1)
        values = out.detach().to(torch.float64).reshape(rows or 1)
        if not (torch.isfinite(values).all() and torch.isfinite(flat).all()):
            raise NonFiniteError(f"{self._typed} has a non-finite value or gradient at a point of the estimate.")
        return values, flat

    def _call(self, params: Leaves) -> torch.Tensor:
        args, kwargs = self._build(tuple(p.clone() for p in params))  # which h may write to, like fn
        out = self._h(*args, **kwargs)
        if not isinstance(out, torch.Tensor):  # here, since vmap has its own words for it
            raise ValueError(f"{self._typed} must return a tensor, got {type(out).__name__} {out!r:.80}.")
        return out

    def _check(self, out: torch.Tensor, wanted: tuple[int, ...]) -> None:
        if tuple(out.shape) != wanted:
            raise ValueError(
                f"{self._typed} must return a tensor of shape {wanted}, as `fn` does, got the shape {tuple(out.shape)}."
            )
        if torch.is_inference_mode_enabled():
            raise ValueError(f"{self._typed} needs its gradient: use `torch.no_grad()`, not `torch.inference_mode()`.")
        if not out.requires_grad:
            raise ValueError(
                f"{self._typed} must be differentiable by autograd in the differentiated arguments: what it returned "
                "does not depend on them."
            )


class _Half:
    """Sums over every other group, of its sum A of ``fn``'s part and its sum B of the surrogate's.

    Args:
        space: the layout of the parameters.
    """

    def __init__(self, space: Space) -> None:
        totals = torch.zeros(7, space.size, dtype=torch.float64, device=space.device)
        self.a, self.b, self.aa, self.ab, self.bb, self.na, self.nb = totals
        self.groups = self.directions = self.squares = 0

    def add(self, held: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take groups of ``held`` directions each, a row each."""
        for total, rows in ((self.a, a), (self.b, b), (self.aa, a * a), (self.ab, a * b), (self.bb, b * b)):
            total += rows.sum(dim=0)
        self.na += held * a.sum(dim=0)
        self.nb += held * b.sum(dim=0)
        self.groups += len(a)
        self.directions += held * len(a)
        self.squares += held * held * len(a)

    def factor(self) -> float:
        """The factor with the least variance, drawn to 1 with the weight of one group; 1 if there is no group."""
        num = self.groups
        trust = float(self.bb.sum()) / max(1, num)
        if not trust:
            return 1.0
        covariance = float((self.ab - self.a * self.b / num).sum())
        variance = float((self.bb - self.b * self.b / num).sum())
        return (trust - covariance) / (trust + variance)


class ControlVariate:
    """The estimate with the surrogate's part in it.

    Args:
        surrogate: the approximation at the points.
        points: the points.
        scheme: the offsets and weights.
        coefficients: those of ``fn``, float64 of shape (N,).

    Attributes:
        factors: what the surrogate's part is multiplied by, in each half of the directions.
        mean: the flat gradient.
    """

    def __init__(self, surrogate: Surrogate, points: Points, scheme: Scheme, coefficients: torch.Tensor) -> None:
        directions = points.directions
        self._groups = Groups(directions, points.sigma)
        self._halves = (_Half(directions.space), _Half(directions.space))
        self._collect(self._rows(surrogate, points, scheme, coefficients.to(directions.space.device)))
        first, second = self._halves
        self.factors: tuple[float, float] = (second.factor(), first.factor())
        total = sum(half.a + a * half.b for a, half in zip(self.factors, self._halves, strict=True))
        self._mean = cast("torch.Tensor", total) / len(directions)
        self.mean: torch.Tensor = self._mean.to(directions.space.dtype)

    def _rows(
        self, surrogate: Surrogate, points: Points, scheme: Scheme, coefficients: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The parts of ``fn`` and of the surrogate for some directions at a time, float64 rows of shape (size,)."""
        center = coefficients.new_tensor(surrogate.center() if scheme.uses_center else 0.0)
        slopes = {c: w * c for c, w in zip(scheme.offsets, scheme.weights, strict=True) if c}
        radii = self._groups.radii(torch.zeros((), dtype=torch.float64, device=points.directions.space.device))
        for lo, values, gradients in surrogate.spans():
            hi = lo + len(values)
            eps = self._groups.rows(lo, hi).double() / radii
            sides = zip(scheme.sides, gradients, strict=True)
            pulled = torch.stack([slopes[c] * g.double() for c, g in sides]).sum(dim=0)
            yield lo, coefficients[lo:hi, None] * eps, pulled - scheme.combine(values, center)[:, None] * eps

    def _collect(self, rows: Iterator[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
        size, waiting = self._groups.size, [torch.empty(0), torch.empty(0)]
        if size == 1:
            for lo, *parts in rows:
                for parity in (0, 1):
                    self._halves[(lo + parity) % 2].add(1, *(part[parity::2] for part in parts))
            return
        first = 0
        for lo, *parts in rows:
            waiting = parts if lo == first else [torch.cat(pair) for pair in zip(waiting, parts, strict=True)]
            held = self._groups.held(first)
            while len(waiting[0]) >= held > 0:
                sums = [part[:held].sum(dim=0, keepdim=True) for part in waiting]
                self._halves[first // size % 2].add(held, *sums)
                waiting = [part[held:] for part in waiting]
                first += held
                held = self._groups.held(first)

    def error_bars(self) -> ErrorBars:
        """The error of the mean, with the factors taken as given."""
        groups, total = self._groups, torch.zeros_like(self._mean)
        for a, half in zip(self.factors, self._halves, strict=True):
            squares = half.aa + 2 * a * half.ab + a * a * half.bb
            total += squares - 2 * self._mean * (half.na + a * half.nb) + self._mean.square() * half.squares
        variance = total.clamp_(min=0) * (groups.count / (groups.count - 1) / len(groups.directions) ** 2)
        return ErrorBars(self.mean, variance, groups, self._both)

    def _both(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (
            (half.a + a * half.b) / half.directions for a, half in zip(self.factors, self._halves, strict=True)
        )
        return first, second


def control_variate(
    h: Callable[..., Any],
    objective: Objective,
    points: Points,
    evaluator: Evaluator,
    scheme: Scheme,
    coefficients: torch.Tensor,
) -> ControlVariate:
    """Return an estimate with a surrogate's part in it.

    Args:
        h: the surrogate.
        objective: ``fn``.
        points: those of the estimate.
        evaluator: how ``fn`` was called.
        scheme: the offsets and weights.
        coefficients: those of ``fn``.

    Returns:
        The surrogate's part; its ``mean`` is the flat gradient.

    Raises:
        ValueError: if ``fn`` returned several values.
    """
    if coefficients.dim() > 1:
        raise ValueError(
            "`zero_order(surrogate=...)` is for objectives of one value, got the shape "
            f"{tuple(coefficients.shape[1:])} from {objective.name}."
        )
    return ControlVariate(Surrogate(h, objective, points, evaluator), points, scheme, coefficients)
