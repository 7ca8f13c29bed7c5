r"""The estimator: values at points to a gradient.

.. code-block:: text

    points_ij  = theta + sigma * c_j * eps_i        the scheme's offsets, the distribution's directions
    values_ij  = fn(points_ij)                      an evaluator: values only, no calculus
    coeff_i    = sum_j w_j * values_ij              the scheme's weights; shaping may transform the values first
    gradient   = mean_i coeff_i * eps_i / sigma     Contraction, the only place that sums directions
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from zograd._points import Directions, Points
from zograd._random import FnStream
from zograd.errors import NonFiniteError, ZeroOrderWarning

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._objective import Objective
    from zograd._tree import Leaves, Space
    from zograd.distributions.base import Distribution
    from zograd.evaluators.base import Evaluator, Piece
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping

__all__ = ["Contraction", "Estimate", "Recipe", "estimate"]

Coefficients: TypeAlias = "torch.Tensor | list[float]"

_NAMED = 8  # directions that an error lists
_FEW = 16  # rows of Python floats up to which plain arithmetic is faster than tensors; the bits are the same


@dataclass(frozen=True)
class Recipe:
    """What an estimate is made of, besides ``fn``, its arguments and the seed."""

    distribution: Distribution
    scheme: Scheme
    num_samples: int
    sigma: tuple[float, ...]  # one a differentiated leaf
    evaluator: Evaluator
    shaping: Shaping | None = None

    def directions(self, space: Space, seed: int) -> Directions:
        """The directions that belong to a seed."""
        return Directions(self.distribution, space, seed, self.num_samples)


class Contraction:
    """The weighted mean of directions, ``mean_i c_i eps_i / sigma``, by fixed blocks in order.

    The sum runs over the same blocks whatever the evaluator's chunks are, so its bits are a function of the
    coefficients.

    Args:
        directions: the directions.
        sigma: the smoothing radius of each leaf.
    """

    def __init__(self, directions: Directions, sigma: tuple[float, ...]) -> None:
        self._directions = directions
        self._sigma = sigma
        self._space = directions.space
        self._done = 0  # directions summed
        self._waiting: torch.Tensor | None = None  # coefficients of a block that is not whole yet
        self._sum: torch.Tensor | None = None

    def add(self, coefficients: Coefficients) -> None:
        """Take the coefficients of the next directions, one for each slice, and sum every block that is whole now."""
        d, space = self._directions, self._space
        if isinstance(coefficients, list):
            c = torch.tensor([coefficients], dtype=space.dtype, device=space.device).t()
        else:
            c = coefficients.reshape(-1, space.slices).to(device=space.device, dtype=space.dtype)
        if self._waiting is not None:
            c = torch.cat([self._waiting, c])
        used, known = 0, c.shape[0]  # not len(): torch's is a Python function
        with full_precision(space.device):
            while (rows := min(d.block, d.num - self._done)) and used + rows <= known:
                self._sum = d.add_sum(self._done, c if rows == known else c[used : used + rows], self._sum)
                self._done += rows
                used += rows
        self._waiting = c[used:] if used < known else None

    def result(self) -> torch.Tensor:
        """The flat gradient, of shape (size,) in the compute dtype."""
        assert self._sum is not None
        divisor = len(self._directions) / self._directions.distribution.scale(self._space)
        if len(set(self._sigma)) == 1:
            return self._sum.div_(divisor * self._sigma[0])
        for leaf, sigma in zip(self._space.split(self._sum), self._sigma, strict=True):
            leaf.div_(divisor * sigma)
        return self._sum


def contract(directions: Directions, sigma: tuple[float, ...], coefficients: torch.Tensor) -> torch.Tensor:
    """The flat gradient that belongs to coefficients of shape (N, slices)."""
    contraction = Contraction(directions, sigma)
    contraction.add(coefficients)
    return contraction.result()


_NOTHING = contextlib.nullcontext()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast: a matrix-vector product of ours in bfloat16 would round the gradient to three digits."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _NOTHING


def by_slice(values: torch.Tensor, space: Space, lead: int) -> torch.Tensor:
    """Values of shape (*lead, *out) as (*lead, slices, outputs a slice)."""
    if space.batch_dim is not None:
        values = values.movedim(lead + space.batch_dim, lead)
    return values.reshape(*values.shape[:lead], space.slices, -1)


@dataclass(eq=False)
class Estimate:
    r"""A gradient estimate and all it was made of.

    Attributes:
        value: ``fn`` at the parameters, one plain call, never shaped.
        directions: the directions, made again when asked for.
        sigma: the smoothing radius of each differentiated leaf.
        seed: what the directions are a function of.
        evaluations: points evaluated, the center included.
        failures: evaluations that failed and were dealt with by a policy.
    """

    value: torch.Tensor
    directions: Directions
    sigma: tuple[float, ...]
    seed: int
    evaluations: int
    failures: int
    _coefficients: list[Coefficients]
    _flat: torch.Tensor | None
    _structure: Callable[[Leaves], Any]

    @cached_property
    def coefficients(self) -> torch.Tensor:
        """What the scheme made of each direction's values: float64, of shape ``(num_samples, *out)``."""
        return _joined(self._coefficients)

    @cached_property
    def grad(self) -> Any:
        """The gradient, in the structure of the differentiated argument (several: a tuple of them).

        Raises:
            ValueError: if ``fn`` returned several values: their gradient needs a cotangent, see :meth:`vjp`.
        """
        if self._flat is None:
            raise ValueError(
                f"`estimate.grad` is for objectives of one value, got the shape {tuple(self.value.shape)}: give "
                "`estimate.vjp(cotangent)` a cotangent of that shape."
            )
        return self._tree(self._flat)

    def vjp(self, cotangent: torch.Tensor) -> Any:
        """The product of a cotangent with the Jacobian, in the structure of the arguments.

        Args:
            cotangent: a tensor of the shape of ``value``.

        Returns:
            The gradient of ``(cotangent * fn(...)).sum()``.

        Raises:
            ValueError: if the cotangent has another shape.
        """
        if cotangent.shape != self.value.shape:
            raise ValueError(
                f"`estimate.vjp(cotangent)` must have the shape of the value, {tuple(self.value.shape)}, got "
                f"{tuple(cotangent.shape)}."
            )
        weights = weigh(self.coefficients, cotangent, self.directions.space)
        flat = contract(self.directions, self.sigma, weights)
        check_gradient(flat, cotangent)
        return self._tree(flat)

    def _tree(self, flat: torch.Tensor) -> Any:
        space = self.directions.space
        return self._structure(space.cast(space.split(flat)))

    def __repr__(self) -> str:
        return (
            f"Estimate(value={self.value}, num_samples={len(self.directions)}, evaluations={self.evaluations}, "
            f"failures={self.failures}, seed={self.seed})"
        )


def weigh(coefficients: torch.Tensor, cotangent: torch.Tensor, space: Space) -> torch.Tensor:
    """Coefficients (N, *out) and a cotangent (*out) to one number a direction and slice, (N, slices)."""
    columns = by_slice(coefficients, space, 1)
    return (columns * by_slice(cotangent.to(columns), space, 0)).sum(dim=2)


def estimate(
    objective: Objective, recipe: Recipe, space: Space, seed: int, structure: Callable[[Leaves], Any] = tuple
) -> Estimate:
    """Estimate the gradient of an objective at its parameters.

    Args:
        objective: the function, with the parameters in ``objective.params``.
        recipe: scheme, distribution, evaluator and their settings.
        space: the layout of the parameters.
        seed: what the directions and the random state of ``fn`` are a function of.
        structure: what makes the user's structure of a tuple of leaves.

    Returns:
        The estimate.

    Raises:
        NonFiniteError: if a value is nan or infinite.
        ValueError: if the evaluator's values do not fit together.
    """
    warn_below_resolution(objective.params, recipe.sigma, "zero_order")
    directions = recipe.directions(space, seed)
    points = Points(objective.params, directions, recipe.sigma, recipe.scheme.sides)
    # User code needs grad mode, whoever calls us: an inner training loop is the main use.
    with torch.enable_grad(), FnStream(seed, space.device, shared=recipe.scheme.uses_center) as objective.stream:
        try:
            coefficients, flat = _run(objective, recipe, points)
        finally:
            objective.stream = None
    objective.commit()
    return Estimate(
        value=objective.value,
        directions=directions,
        sigma=recipe.sigma,
        seed=seed,
        evaluations=1 + len(directions) * len(points.sides) + objective.repeated,
        failures=0,
        _coefficients=coefficients,
        _flat=flat,
        _structure=structure,
    )


def warn_below_resolution(params: Leaves, sigma: tuple[float, ...], call: str) -> None:
    """A half-precision leaf rounds small steps away, and with them its gradient."""
    for leaf, radius in zip(params, sigma, strict=True):
        if leaf.dtype not in (torch.bfloat16, torch.float16):
            continue
        resolution = torch.finfo(leaf.dtype).eps * float(leaf.abs().mean(dtype=torch.float32))
        if radius < resolution / 2:
            warnings.warn(
                f"`{call}(sigma=...)` is {radius:g}, below the resolution of {leaf.dtype} at a typical parameter, "
                f"{resolution:.2g}: most perturbations round to nothing. Use a larger sigma or float32 parameters.",
                ZeroOrderWarning,
                stacklevel=2,
            )


def _run(objective: Objective, recipe: Recipe, points: Points) -> tuple[list[Coefficients], torch.Tensor | None]:
    """The coefficients by pieces and, for an objective of one value a slice, the flat gradient."""
    space, sides = points.directions.space, points.sides
    pieces = recipe.evaluator(objective, points)
    try:
        center = next(pieces, None)
        if not isinstance(center, torch.Tensor):
            raise ValueError(f"the evaluator must yield the center's value first, a tensor, got {center!r:.80}.")
        _check_center(center, space, recipe, objective.name)
        contraction = Contraction(points.directions, recipe.sigma) if center.numel() == space.slices else None
        kept: list[Coefficients] = []
        hi = 0
        for piece in _whole(pieces, points, center):
            lo, hi = hi, hi + len(piece)
            coefficients = _combine(recipe.scheme, piece, center)
            if not _all_finite(coefficients):  # a value that is not finite makes its coefficient so
                raise _not_finite(_values(piece), lo, sides, objective.name)
            kept.append(_values(piece) if recipe.shaping else coefficients)
            if contraction is not None and not recipe.shaping:
                contraction.add(coefficients)
    finally:
        if isinstance(pieces, Generator):  # let it clean up now, not when it is collected
            pieces.close()
    if recipe.shaping:
        kept = [_shaped(_joined(kept), center, recipe)]
        if contraction is not None:
            contraction.add(kept[0])
    if contraction is None:
        return kept, None
    flat = contraction.result()
    check_gradient(flat)
    return kept, flat


def _combine(scheme: Scheme, piece: Piece, center: torch.Tensor) -> Coefficients:
    if isinstance(piece, list) and len(piece) <= _FEW:
        level = center.item()
        return [scheme.difference(row, level) for row in piece]
    return scheme.combine(_values(piece), center)


def _values(piece: Piece) -> torch.Tensor:
    return torch.tensor(piece, dtype=torch.float64) if isinstance(piece, list) else piece


def _joined(pieces: list[Coefficients]) -> torch.Tensor:
    tensors = [torch.tensor(p, dtype=torch.float64) if isinstance(p, list) else p for p in pieces]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def check_gradient(flat: torch.Tensor, cotangent: torch.Tensor | None = None) -> None:
    """Raise if the gradient overflowed; an infinite cotangent is the caller's own (a GradScaler looks for it)."""
    if not _all_finite(flat) and (cotangent is None or _all_finite(cotangent)):
        raise NonFiniteError(
            f"the gradient is not finite although the values are: their size, or 1/sigma, overflows {flat.dtype}. "
            "Scale the "
            "values down, or pass float64 tensors."
        )


def _whole(pieces: Iterator[Piece], points: Points, center: torch.Tensor) -> Iterator[Piece]:
    """The pieces, checked to be the evaluator's whole and in shape."""
    seen, wanted = 0, (len(points.sides), *center.shape)
    for piece in pieces:
        seen += len(piece)
        shapes = {(len(row),) for row in piece} if isinstance(piece, list) else {tuple(piece.shape[1:])}
        if shapes != {wanted} or seen > len(points):
            got = " and ".join(str((len(piece), *shape)) for shape in shapes)
            raise ValueError(
                f"the evaluator must yield {len(points)} directions of values of shape {wanted}, got a piece of shape "
                f"{got} that ends at direction {seen}."
            )
        yield piece
    if seen < len(points):
        raise ValueError(f"the evaluator must yield {len(points)} directions of values, got {seen}.")


def _shaped(values: torch.Tensor, center: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    assert recipe.shaping is not None
    baseline = center if recipe.scheme.uses_center else torch.zeros_like(center)
    shaped = recipe.shaping(values - baseline)
    if not isinstance(shaped, torch.Tensor) or shaped.shape != values.shape:
        got = tuple(shaped.shape) if isinstance(shaped, torch.Tensor) else type(shaped).__name__
        raise ValueError(
            f"`zero_order(shaping=...)` must keep the shape of the values, {tuple(values.shape)}, got {got}."
        )
    if not _all_finite(shaped):
        raise NonFiniteError(f"`zero_order(shaping=...)` made non-finite values of finite ones: {recipe.shaping}.")
    return recipe.scheme.combine(shaped.to(values), torch.zeros_like(center))


def _all_finite(values: Coefficients) -> bool:
    if isinstance(values, list):
        return all(map(math.isfinite, values))
    # A sum is one operation where isfinite and all are two; only if it overflows is it not the answer.
    return math.isfinite(values if values.numel() == 1 else values.sum()) or bool(torch.isfinite(values).all())


def _check_center(center: torch.Tensor, space: Space, recipe: Recipe, name: str) -> None:
    shape = tuple(center.shape)
    if recipe.shaping is not None and shape:
        raise ValueError(
            f"`zero_order(shaping=...)` is for objectives of one value, got the shape {shape} from {name}."
        )
    if space.batch_dim is not None and (len(shape) <= space.batch_dim or shape[space.batch_dim] != space.slices):
        raise ValueError(
            f"`zero_order(batch_dim={space.batch_dim})`: {name} must return one entry a slice, {space.slices} along "
            f"dimension {space.batch_dim}, got the shape {shape}."
        )
    if not _all_finite(center):
        bad = int((~torch.isfinite(center)).sum())
        raise NonFiniteError(
            f"{name} returned {bad} non-finite value{'s' * (bad > 1)} of {center.numel()} at the parameters themselves "
            f"(the center): {center.flatten()[:_NAMED].tolist()}."
        )


def _not_finite(values: torch.Tensor, lo: int, sides: tuple[float, ...], name: str) -> NonFiniteError:
    points = (~torch.isfinite(values)).flatten(2).any(dim=2) if values.dim() > 2 else ~torch.isfinite(values)
    where = [f"{lo + i} (offset {sides[j]:+g})" for i, j in points.nonzero()[:_NAMED].tolist()]
    count, hi = int(points.sum()), lo + len(values)
    return NonFiniteError(
        f"{name} returned non-finite values at {count} of {points.numel()} points, those of directions {lo} to "
        f"{hi - 1}: at "
        f"direction {', '.join(where)}{', ...' if count > _NAMED else ''}. A gradient from them would be wrong; "
        "return a finite penalty instead, of the size of the other values."
    )
