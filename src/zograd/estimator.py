r"""The estimator: values at points to a gradient.

.. code-block:: text

    points_ij  = theta + sigma * c_j * eps_i        the scheme's offsets, the distribution's directions
    values_ij  = fn(points_ij)                      an evaluator: values only, no calculus
    coeff_i    = sum_j w_j * values_ij              the scheme's weights; shaping may transform the values first
    gradient   = mean_i coeff_i * eps_i / sigma     Contraction, the only place that sums directions
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from zograd._contraction import Contraction, by_slice, contract, weigh
from zograd._curvature import by_direction, differences, hessian_product, refusal, refused
from zograd._error_bars import ErrorBars, Groups, compared, spread
from zograd._points import Directions, Points
from zograd._random import FnStream
from zograd._surrogate import ControlVariate, Surrogate
from zograd._tree import same_structure, take_apart
from zograd.errors import EvaluationError, NonFiniteError, SecondDerivativeError, ZeroOrderWarning
from zograd.failures import dropping
from zograd.shaping import centered_ranks, leave_one_out, standardize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zograd._contraction import Coefficients
    from zograd._objective import Objective
    from zograd._tree import Leaves, Space
    from zograd.distributions.base import Distribution
    from zograd.evaluators.base import Evaluator, Piece
    from zograd.failures import Drop, Failures
    from zograd.sampling import Until
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping

__all__ = ["Estimate", "Recipe", "estimate"]

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
    surrogate: Callable[..., Any] | None = None
    failures: Failures = "raise"
    until: Until | None = None  # stops before num_samples

    @property
    def evaluations(self) -> int:
        """Points of an estimate, the center included."""
        return 1 + self.num_samples * len(self.scheme.sides)

    def directions(self, space: Space, seed: int) -> Directions:
        """The directions that belong to a seed."""
        return Directions(self.distribution, space, seed, self.num_samples)

    def no_curvature(self, *, scalar: bool) -> str | None:
        """Why its estimates have no second derivative, or None if they have one."""
        return refusal(self.distribution, self.shaping, self.num_samples, scalar=scalar)


class Evidence:
    """The values of an estimate, from which more can be told later than its gradient.

    Args:
        recipe: what the estimate is made of.
        pieces: the values, as the evaluator gave them.
        center: the value at the center.
    """

    def __init__(self, recipe: Recipe, pieces: list[Piece], center: torch.Tensor) -> None:
        self.recipe = recipe
        self._pieces = pieces
        self._center = center
        self.control: ControlVariate | None = None  # the part of a surrogate

    def differences(self, directions: Directions) -> torch.Tensor:
        """The second difference along each direction, float64 of shape (N, *out), the mean of the others removed."""
        values, alive = _joined(self._pieces), self.alive
        if alive is None:
            rows = differences(self.recipe.scheme, directions, values, self._center)
            return rows.to(directions.space.device)  # of a black box on the CPU they are there
        if not directions.distribution.independent:
            raise SecondDerivativeError(
                refused(f"directions were dropped, and those of {directions.distribution} depend on each other")
            )
        rows = _spread(differences(self.recipe.scheme, directions, values[alive], self._center), alive)
        return rows.to(directions.space.device)

    @cached_property
    def alive(self) -> torch.Tensor | None:
        """Which directions were not dropped; None for all."""
        alive = _alive(_joined(self._pieces)).cpu()
        return None if bool(alive.all()) else alive

    def reshaped(self, kept: torch.Tensor) -> torch.Tensor:
        """The coefficients that a shaping makes of the values of some directions alone, zero at the others."""
        kept = kept if self.alive is None else kept & self.alive
        num, sides = int(kept.sum()), len(self.recipe.scheme.sides)
        if num * sides < 2:
            raise ValueError(
                f"`estimate.standard_error()` shapes parts of the values on their own, and a part of {num} has nothing "
                "to be compared with: `num_samples` must be at least 4 here."
            )
        rows = torch.zeros(len(kept), 1, dtype=torch.float64)
        rows[kept, 0] = _shaped(_joined(self._pieces)[kept], self._center, self.recipe).cpu()
        return rows


@dataclass(eq=False)
class Estimate:
    r"""A gradient estimate and all it was made of.

    Attributes:
        value: ``fn`` at the parameters, one plain call, never shaped.
        directions: the directions, made again when asked for.
        sigma: the smoothing radius of each differentiated leaf.
        seed: what the directions are a function of.
        evaluations: points evaluated, the center and retries included.
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
    _evidence: Evidence
    _structure: Callable[[Sequence[Any]], Any]

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
        space = self.directions.space
        if self._flat is None:
            flat = contract(self.directions, self.sigma, weigh(self.coefficients, cotangent, space))
        else:  # not from the coefficients: a surrogate has a part in it
            by_value = by_slice(cotangent.to(self._flat), space, 0)
            flat = (self._flat.view(space.slices, space.dim) * by_value).view(-1)
        check_gradient(flat, cotangent)
        return self._tree(flat)

    def hvp(self, vector: Any) -> Any:
        r"""The product of the Hessian with a vector, from the values that the gradient was made of.

        .. math:: \hat H v = \frac{1}{N \sigma^2} \sum_{i=1}^{N} \tilde h_i (\epsilon_i \epsilon_i^\top - I) v,
                  \qquad h_i = \sum_j \frac{w_j}{c_j} (f_{ij} - f_0)

        By Stein's identity its mean is the Hessian of the smoothed function, for any ``fn``: :math:`\tilde h_i` is
        :math:`h_i` minus the mean over the other directions. The error falls with :math:`1 / \sqrt N`. Antithetic
        differences cancel the gradient's part of :math:`h_i`; with one-sided ones it stays, as noise of the size
        :math:`\lVert g \rVert / \sigma`. The same product comes from autograd with ``create_graph=True``.

        Args:
            vector: in the structure of ``grad``.

        Returns:
            The product, in the same structure.

        Raises:
            SecondDerivativeError: if the distribution's marginals are not Gaussian, or a shaping changed the values.
            ValueError: if ``fn`` returned several values, or the vector has another structure or other shapes.

        Examples:
            >>> import torch, zograd
            >>> @zograd.zero_order(method="antithetic", num_samples=20_000, sigma=0.1, evaluator="vmap", seed=0)
            ... def fn(x):
            ...     return x[0] * x[1]
            >>> fn.estimate(torch.zeros(2)).hvp(torch.ones(2)).round()
            tensor([1., 1.])

        References:
            Song et al., "ES-MAML" (arXiv:1910.01215).
        """
        if self._flat is None:
            raise ValueError(
                f"`estimate.hvp(vector)` is for objectives of one value, got the shape {tuple(self.value.shape)}."
            )
        reason = self._evidence.recipe.no_curvature(scalar=True)
        if reason:
            raise SecondDerivativeError(refused(reason))
        space = self.directions.space
        leaves, together = take_apart(vector)
        shapes = together([tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves])
        wanted = self._structure([tuple(shape) for shape in space.shapes])
        fits = same_structure(vector, self.grad) and take_apart(shapes)[0] == take_apart(wanted)[0]
        if not fits:
            raise ValueError(
                f"`estimate.hvp(vector)` must have tensors of the shapes of `grad`, {wanted}, got {shapes}."
            )
        rows = by_direction(self._evidence.differences(self.directions), space)
        return self._tree(hessian_product(self.directions, self.sigma, rows, space.join(tuple(leaves))))

    def standard_error(self) -> Any:
        r"""The standard error of each entry of ``grad``, from the values that the gradient was made of.

        .. math:: \widehat{se}^2 = \frac{B}{(B - 1) N^2} \sum_{b=1}^{B} \Big( \sum_{i \in b}
                  (c_i \epsilon_i / \sigma - \hat g) \Big)^2

        The sums run over B groups of directions that do not depend on each other: single directions, or whole blocks
        of ``Orthogonal()``, ``Hadamard()`` and ``Sobol()``. For ``centered_ranks`` and ``standardize`` it is a
        jackknife over up to 32 parts. It is the error about the mean of the estimate, the gradient of the *smoothed*
        function; the bias of a large ``sigma`` does not show in it. The target lies within two standard errors in about
        95 % of the entries; with fewer than about 20 groups in less.

        Returns:
            Tensors in the structure of ``grad``.

        Raises:
            ValueError: if there is one group only, ``fn`` returned several values, or the error of the shaping is not
                known.

        Examples:
            >>> import torch, zograd
            >>> estimate = zograd.zero_order(num_samples=400, seed=0)(lambda x: x.sum()).estimate(torch.zeros(2))
            >>> ((estimate.grad - 1).abs() < 3 * estimate.standard_error()).all()
            tensor(True)
        """
        return self._tree(self._error_bars.variance.sqrt())

    def snr(self) -> float:
        r"""The signal-to-noise ratio: the length of the gradient over the length of its error.

        .. math:: \sqrt{\max(0, \lVert \hat g \rVert^2 - \lVert \widehat{se} \rVert^2)} / \lVert \widehat{se} \rVert

        The noise's own share is taken off the estimate's length, so that noise alone has a ratio about 0.

        Returns:
            The ratio; infinite if the groups of directions agree exactly.

        Raises:
            ValueError: as :meth:`standard_error`.
        """
        return self._error_bars.snr

    def split_half_cosine(self) -> float:
        """The cosine between the gradients that every other group of directions and the rest give.

        Between 0 for noise alone and 1: what one would see by estimating twice with half the directions each.

        Returns:
            The cosine.

        Raises:
            ValueError: as :meth:`standard_error`.
        """
        return self._error_bars.split_half_cosine()

    def samples_needed(self, cosine: float = 0.9) -> float:
        r"""How many directions an estimate here needs for this cosine to its target.

        .. math:: n = N \frac{\cos^2}{1 - \cos^2} \frac{1}{\mathrm{snr}^2}

        All noise is taken to be across the gradient, which is a little on the safe side where there are few parameters.

        Args:
            cosine: between the estimate and the gradient of the smoothed function, above 0 and below 1.

        Returns:
            ``num_samples``, in whole groups of directions that depend on each other; infinite if this estimate does not
            rise above its noise, so that it cannot tell.

        Raises:
            ValueError: if the cosine is out of range, and as :meth:`standard_error`.
        """
        if not 0 < cosine < 1:
            raise ValueError(f"`estimate.samples_needed(cosine=...)` must lie between 0 and 1, got {cosine!r}.")
        return self._error_bars.needed(cosine)

    @cached_property
    def _error_bars(self) -> ErrorBars:
        """The error of ``grad``."""
        recipe, typed = self._evidence.recipe, "`estimate.standard_error()`"
        if self._flat is None:
            raise ValueError(f"{typed} is for objectives of one value, got the shape {tuple(self.value.shape)}.")
        shaping = recipe.shaping
        if shaping not in (None, leave_one_out, centered_ranks, standardize):
            raise ValueError(
                f"{typed} knows no error of `shaping={getattr(shaping, '__name__', shaping)}`, which makes directions "
                "depend on each other: use `shaping=None` to see how good the gradient is."
            )
        groups = Groups(self.directions, self.sigma, self._evidence.alive)
        groups.check(typed)
        if self._evidence.control is not None:
            return self._evidence.control.error_bars()
        if shaping in (None, leave_one_out):
            return spread(groups, by_direction(self.coefficients, self.directions.space), self._flat)
        return compared(groups, self._evidence.reshaped, self._flat)

    def _tree(self, flat: torch.Tensor) -> Any:
        space = self.directions.space
        return self._structure(space.cast(space.split(flat)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: part for name, part in self.__dict__.items() if name != "_error_bars"}  # made again if asked for

    def __repr__(self) -> str:
        return (
            f"Estimate(value={self.value}, num_samples={len(self.directions)}, evaluations={self.evaluations}, "
            f"failures={self.failures}, seed={self.seed})"
        )


def estimate(
    objective: Objective, recipe: Recipe, space: Space, seed: int, structure: Callable[[Sequence[Any]], Any] = tuple
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
        EvaluationError: if ``fn`` raises at a point, or too few directions survive.
        ValueError: if the evaluator's values do not fit together.
    """
    warn_below_resolution(objective.params, recipe.sigma, "zero_order")
    directions = recipe.directions(space, seed)
    points = Points(objective.params, directions, recipe.sigma, recipe.scheme.sides)
    # User code needs grad mode, whoever calls us: an inner training loop is the main use.
    with torch.enable_grad(), FnStream(seed, space.device, shared=recipe.scheme.uses_center) as objective.stream:
        try:
            coefficients, flat, evidence, directions = _run(objective, recipe, points)
            if recipe.surrogate is not None:
                flat = _controlled(recipe.surrogate, objective, points, _joined(coefficients), evidence)
        finally:
            objective.stream = None
    objective.commit()
    return Estimate(
        value=objective.value,
        directions=directions,
        sigma=recipe.sigma,
        seed=seed,
        evaluations=1 + len(directions) * len(points.sides) + objective.repeated,
        failures=objective.failures,
        _coefficients=coefficients,
        _flat=flat,
        _evidence=evidence,
        _structure=structure,
    )


def check_radii(sigma: tuple[float, ...], scheme: Scheme, dtype: torch.dtype, call: str) -> None:
    """Refuse a step that the compute dtype cannot hold; torch's own error would name neither."""
    largest = max(sigma) * max(map(abs, scheme.sides))
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"`{call}(sigma=...)` must make steps within the range of {dtype}, at most {torch.finfo(dtype).max:.3g}, "
            f"got {max(sigma):g}. Pass float64 tensors, or scale the parameters down."
        )


def _wider(dtype: torch.dtype) -> str:
    return {torch.float32: "float64 parameters", torch.float64: "smaller parameters"}.get(dtype, "float32 parameters")


def warn_below_resolution(params: Leaves, sigma: tuple[float, ...], call: str) -> None:
    """A leaf rounds steps below its resolution away, and with them its gradient."""
    for leaf, radius in zip(params, sigma, strict=True):
        eps = torch.finfo(leaf.dtype).eps
        if leaf.dtype not in (torch.bfloat16, torch.float16) and radius > 100 * eps:
            continue  # the mean would cost time in each estimate, and few parameters are that large
        resolution = eps * float(leaf.abs().mean(dtype=torch.promote_types(leaf.dtype, torch.float32)))
        if radius < resolution / 2:
            warnings.warn(
                f"`{call}(sigma=...)` is {radius:g}, below the resolution of {leaf.dtype} at a typical parameter, "
                f"{resolution:.2g}: most perturbations round to nothing. Use a larger sigma or {_wider(leaf.dtype)}.",
                ZeroOrderWarning,
                stacklevel=2,
            )


def _run(
    objective: Objective, recipe: Recipe, points: Points
) -> tuple[list[Coefficients], torch.Tensor | None, Evidence, Directions]:
    """The coefficients by pieces, the gradient of an objective of one value a slice, the values and the directions."""
    directions, sides = points.directions, points.sides
    space = directions.space
    pieces = recipe.evaluator(objective, points) if recipe.until is None else _rounds(objective, recipe, points)
    try:
        center = next(pieces, None)
        if not isinstance(center, torch.Tensor):
            raise ValueError(f"the evaluator must yield the center's value first, a tensor, got {center!r:.80}.")
        _check_center(center, space, recipe, objective.name)
        drop = dropping(recipe.failures)
        single = center.numel() == space.slices  # one value, or one a slice
        waits = bool(recipe.shaping or drop or recipe.until)  # for the last value
        contraction = Contraction(directions, recipe.sigma) if single and not waits else None
        kept: list[Coefficients] = []
        seen: list[Piece] = []
        hi = lost = 0
        for piece in _whole(pieces, points, center, recipe.until):
            lo, hi = hi, hi + len(piece)
            coefficients = _combine(recipe.scheme, piece, center)
            if not _all_finite(coefficients):  # a value that is not finite makes its coefficient so
                if drop is None:
                    raise _not_finite(_values(piece), lo, sides, objective.name)
                lost += int((~_alive(_values(piece))).sum())
                _check_survivors(drop, lost, len(points), objective.name)
            seen.append(piece)
            if waits:
                continue
            kept.append(coefficients)
            if contraction is not None:
                contraction.add(coefficients)
    finally:
        if isinstance(pieces, Generator):  # let it clean up now, not when it is collected
            pieces.close()
    if waits:
        directions = directions.first(hi)
        if drop and recipe.until:
            _check_survivors(drop, lost, hi, objective.name)
        survivors = _survivors(_joined(seen), center, recipe)
        kept = [survivors]
        if lost:
            _warn_of_dropped(lost, hi, objective.name)
        flat = contract(directions, recipe.sigma, survivors) if single else None
    else:
        flat = None if contraction is None else contraction.result()
    if flat is not None:
        check_gradient(flat)
    return kept, flat, Evidence(recipe, seen, center), directions


def _rounds(objective: Objective, recipe: Recipe, points: Points) -> Iterator[Piece]:
    """The center and the values of ever more directions, until the gradient from them is good enough."""
    until, directions = recipe.until, points.directions
    assert until is not None
    typed = f"`zero_order(num_samples={until})`"
    group = directions.distribution.group(directions.space, directions.num)
    Groups(directions, recipe.sigma).check(typed)
    lo, hi = 0, until.first(group)
    seen: list[Piece] = []
    center = torch.zeros(())
    while True:
        pieces = recipe.evaluator(objective, points, lo, hi, center=not lo)
        if not lo:
            center = _values(next(pieces))
            yield center
            if center.numel() != directions.space.slices:
                raise ValueError(f"{typed} is for objectives of one value, got the shape {tuple(center.shape)}.")
        for piece in pieces:
            seen.append(piece)
            yield piece
        if hi == until.bound:
            return
        evidence, some = Evidence(recipe, seen, center), directions.first(hi)
        rows = by_direction(_survivors(_joined(seen), center, recipe), directions.space)
        groups = Groups(some, recipe.sigma, evidence.alive)
        snr = spread(groups, rows, contract(some, recipe.sigma, rows)).snr if groups.count > 1 else 0.0
        if snr >= until.snr:
            return
        lo, hi = hi, until.following(hi, snr, group)


def _controlled(
    surrogate: Callable[..., Any],
    objective: Objective,
    points: Points,
    coefficients: torch.Tensor,
    evidence: Evidence,
) -> torch.Tensor:
    """The flat gradient with the surrogate's part, from which the evidence tells its error."""
    if coefficients.dim() > 1:
        raise ValueError(
            "`zero_order(surrogate=...)` is for objectives of one value, got the shape "
            f"{tuple(coefficients.shape[1:])} from {objective.name}."
        )
    recipe = evidence.recipe
    approximation = Surrogate(surrogate, objective, points, recipe.evaluator)
    evidence.control = ControlVariate(approximation, points, recipe.scheme, coefficients)
    check_gradient(evidence.control.mean)
    return evidence.control.mean


def _combine(scheme: Scheme, piece: Piece, center: torch.Tensor) -> Coefficients:
    if isinstance(piece, list) and len(piece) <= _FEW:
        level = center.item()
        return [scheme.difference(row, level) for row in piece]
    return scheme.combine(_values(piece), center)


def _values(piece: Coefficients | Piece) -> torch.Tensor:
    return torch.tensor(piece, dtype=torch.float64) if isinstance(piece, list) else piece


def _joined(pieces: Sequence[Coefficients | Piece]) -> torch.Tensor:
    tensors = [_values(piece) for piece in pieces]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def check_gradient(flat: torch.Tensor, cotangent: torch.Tensor | None = None) -> None:
    """Raise if the gradient overflowed; an infinite cotangent is the caller's own (a GradScaler looks for it)."""
    if not _all_finite(flat) and (cotangent is None or _all_finite(cotangent)):
        raise NonFiniteError(
            f"the gradient is not finite although the values are: their size, or 1/sigma, overflows {flat.dtype}. "
            "Scale the "
            "values down, or pass float64 tensors."
        )


def _whole(pieces: Iterator[Piece], points: Points, center: torch.Tensor, until: Until | None) -> Iterator[Piece]:
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
    if seen < len(points) and until is None:
        raise ValueError(f"the evaluator must yield {len(points)} directions of values, got {seen}.")


def _alive(values: torch.Tensor) -> torch.Tensor:
    """Which directions have finite values only."""
    return torch.isfinite(values).flatten(1).all(dim=1)


def _spread(rows: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Rows of the survivors among all, such that the mean over all is that over the survivors."""
    out = rows.new_zeros((len(alive), *rows.shape[1:]))
    out[alive] = rows * (len(alive) / len(rows))
    return out


def _survivors(values: torch.Tensor, center: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The coefficients of directions whose values are finite, the others' being zero."""
    alive = _alive(values)
    whole = bool(alive.all())
    rows = values if whole else values[alive]
    rows = _shaped(rows, center, recipe) if recipe.shaping else recipe.scheme.combine(rows, center)
    return rows if whole else _spread(rows, alive)


def _check_survivors(drop: Drop, lost: int, num: int, name: str) -> None:
    if num - lost < max(1, drop.min_success * num):
        raise EvaluationError(
            f"`Drop(min_success={drop.min_success:g})`: of {num} directions of {name} {lost} failed already, so that "
            f"fewer than {drop.min_success:.0%} can survive. The estimate was stopped."
        )


def _warn_of_dropped(lost: int, num: int, name: str) -> None:
    warnings.warn(
        f"{lost} of {num} directions were dropped since an evaluation of {name} failed; the gradient is the mean over "
        "the others. It is biased if failure depends on the point: see `zograd.failures.Drop`.",
        ZeroOrderWarning,
        stacklevel=2,
    )


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
