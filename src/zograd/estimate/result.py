"""A finished estimate: the gradient, what it was made of, and how good it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.trees import by_slice, one_per_slice, same_structure, take_apart, weigh
from zograd.distributions.directions import contract, project
from zograd.errors import SecondDerivativeError
from zograd.estimate.second_order import differences, hessian_product, refused
from zograd.estimate.settings import Settings, among_all, check_gradient, combine, survivors
from zograd.estimate.statistics import ErrorBars, Groups, HasErrorBars, compared, spread
from zograd.shaping import centered_ranks, leave_one_out, standardize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zograd.distributions.directions import Directions


@dataclass(eq=False)
class Estimate:
    r"""A gradient estimate and all it was made of.

    Attributes:
        value: ``fn`` at the parameters, one plain call, never shaped.
        center: the same in float64.
        values: ``fn`` at the points, in float64 and of shape ``(num_samples, offsets, *out)``, those of dropped
            directions not being finite.
        coefficients: one for each direction, the sum of the scheme's weights times its (shaped) values, in float64 and
            of shape ``(num_samples, *out)``.
        directions: the directions, made again when asked for; ``len()`` is how many there are, and
            ``directions.entries(i, 0, directions.space.size)`` yields the entries of direction i in runs, each with the
            place where it begins.
        settings: what the estimate is made of.
        evaluations: points evaluated, the center and retries included.
        failures: evaluations that failed and were dealt with by a policy.
        flat: the gradient as one vector, in the compute dtype; None if ``fn`` returned several values.
        control: the part of a surrogate, if there is one.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(method="antithetic", num_samples=100, seed=0)
        ... def fn(params):
        ...     return params["a"].square().sum() + 3 * params["b"]
        >>> estimate = fn.estimate({"a": torch.ones(2), "b": torch.tensor(0.0)})
        >>> estimate.value, estimate.evaluations, sorted(estimate.grad)
        (tensor(2.), 201, ['a', 'b'])
        >>> estimate.samples_needed(cosine=0.9) < 30
        True
    """

    value: torch.Tensor
    values: torch.Tensor
    coefficients: torch.Tensor
    directions: Directions
    settings: Settings
    evaluations: int
    failures: int
    flat: torch.Tensor | None
    center: torch.Tensor
    _structure: Callable[[Sequence[Any]], Any] = tuple
    control: HasErrorBars | None = None

    @property
    def sigma(self) -> tuple[float, ...]:
        """The smoothing radius of each differentiated leaf."""
        return self.settings.sigma

    @property
    def seed(self) -> int:
        """What the directions are a function of."""
        return self.directions.seed

    @cached_property
    def grad(self) -> Any:
        """The gradient, in the structure of the differentiated argument (a tuple where there are several).

        Raises:
            ValueError: if ``fn`` returned several values: their gradient needs a cotangent, see :meth:`vjp`.
        """
        if self.flat is None:
            raise ValueError(
                f"`estimate.grad` is for objectives of one value, got the shape {tuple(self.value.shape)}: give "
                "`estimate.vjp(cotangent)` a cotangent of that shape."
            )
        return self._tree(self.flat)

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
        if self.flat is None:
            flat = contract(self.directions, self.sigma, weigh(self.coefficients, cotangent, space))
        else:  # not from the coefficients: a surrogate has a part in it
            by_value = by_slice(cotangent.to(self.flat), space, 0)
            flat = (self.flat.view(space.slices, space.dim) * by_value).view(-1)
        check_gradient(flat, cotangent)
        return self._tree(flat)

    def hvp(self, vector: Any) -> Any:
        r"""The product of the Hessian with a vector, from the values that the gradient was made of.

        .. math:: \hat H v = \frac{1}{N \sigma^2} \sum_{i=1}^{N} \tilde h_i (\epsilon_i \epsilon_i^\top - I) v

        .. math:: h_i = \sum_j \frac{w_j}{c_j} (f_{ij} - f_0)

        By Stein's identity its mean is the Hessian of the smoothed function, for any ``fn``: :math:`\tilde h_i` is
        :math:`h_i` minus the mean over the other directions, :math:`f_{ij}` the value at offset :math:`c_j` along
        direction i, :math:`f_0` the value at the parameters. The error falls with :math:`1 / \sqrt N`. Antithetic
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
            >>> settings = {"method": "antithetic", "num_samples": 20_000, "sigma": 0.1, "evaluator": "vmap"}
            >>> @zograd.zero_order(**settings, seed=0)
            ... def fn(x):
            ...     return x[0] * x[1]
            >>> fn.estimate(torch.zeros(2)).hvp(torch.ones(2)).round()
            tensor([1., 1.])

        References:
            Song et al., "ES-MAML" (arXiv:1910.01215).
        """
        if self.flat is None:
            raise ValueError(
                f"`estimate.hvp(vector)` is for objectives of one value, got the shape {tuple(self.value.shape)}."
            )
        reason = self.settings.no_second(scalar=True)
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
        rows = one_per_slice(self.differences(), space)
        parts = [functools.partial(f, self.directions, self.sigma) for f in (contract, project)]
        return self._tree(hessian_product(space, self.sigma, rows, space.join(tuple(leaves)), *parts))

    def differences(self) -> torch.Tensor:
        """Return the second difference along each direction, float64 ``(num_samples, *out)``, minus a baseline.

        Raises:
            SecondDerivativeError: if directions that depend on each other were dropped.
        """
        d, alive = self.directions, self.alive
        if alive is None:
            rows = differences(self.settings.scheme, d, self.values, self.center)
            return rows.to(d.space.device)  # of a black box on the CPU they are there
        if not d.distribution.independent:
            raise SecondDerivativeError(
                refused(f"directions were dropped, and those of {d.distribution} depend on each other")
            )
        rows = differences(self.settings.scheme, d, self.values[alive], self.center)
        return among_all(rows, alive).to(d.space.device)

    @cached_property
    def alive(self) -> torch.Tensor | None:
        """A mask of the directions that were not dropped; None if that is all of them."""
        alive = survivors(self.settings.policy, self.values)
        return None if alive is None else alive.cpu()

    def standard_error(self) -> Any:
        r"""The standard error of each entry of ``grad``, from the values that the gradient was made of.

        .. math:: \widehat{se}^2 = \frac{B}{(B - 1) N^2} \sum_{b=1}^{B} \left( \sum_{i \in b}
                  (a_i \epsilon_i / \sigma - \hat g) \right)^2

        The coefficients :math:`a_i` are those of ``coefficients`` (times d for ``Coordinate()``, whose estimate is d
        times a mean), N counts the directions that were not dropped, and a surrogate's part is in each term. The sums
        run over B groups of directions that do not depend on each other: single directions, or whole blocks of
        ``Orthogonal()``, ``Hadamard()``, ``Sobol()`` and ``Coordinate()``. For ``centered_ranks`` and ``standardize``
        it is a jackknife over up to 32 parts. It is the error about the mean of the estimate, the gradient of the
        *smoothed* function; the bias of a large ``sigma`` does not show in it. The target lies within two standard
        errors in about 95 % of the entries; with fewer than about 20 groups in less.

        Returns:
            Tensors in the structure of ``grad``.

        Raises:
            ValueError: if there is one group only, ``fn`` returned several values, the error of the shaping is not
                known, or directions that depend on each other were dropped.

        Examples:
            >>> import torch, zograd
            >>> fn = zograd.zero_order(num_samples=400, seed=0)(lambda x: x.sum())
            >>> estimate = fn.estimate(torch.zeros(2))
            >>> ((estimate.grad - 1).abs() < 3 * estimate.standard_error()).all()
            tensor(True)
        """
        return self._tree(self._error_bars.variance.sqrt())

    def snr(self) -> float:
        r"""The signal-to-noise ratio: the length of the gradient over the length of its error.

        .. math:: \sqrt{\max(0, \lVert \hat g \rVert^2 - \lVert \widehat{se} \rVert^2)} / \lVert \widehat{se} \rVert

        The noise's own share is taken off the estimate's length, so that noise alone has a ratio about 0.

        Returns:
            The ratio; infinite if the groups of directions agree exactly, and 0 if the gradient is zero.

        Raises:
            ValueError: as :meth:`standard_error`.
        """
        return self._error_bars.snr

    def split_half_cosine(self) -> float:
        """The cosine between the gradients that every other group of directions and the rest give.

        About 0, of either sign, for noise alone, and 1 without noise: what one would see by estimating twice with half
        the directions each.

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
        cosine = checks.number(cosine, "`estimate.samples_needed(cosine=...)`")
        if not 0 < cosine < 1:
            raise ValueError(f"`estimate.samples_needed(cosine=...)` must lie between 0 and 1, got {cosine!r}.")
        return self._error_bars.needed(cosine)

    @cached_property
    def _error_bars(self) -> ErrorBars:
        """The error of ``grad``."""
        shaping, typed = self.settings.shaping, "`estimate.standard_error()`"
        if self.flat is None:
            raise ValueError(f"{typed} is for objectives of one value, got the shape {tuple(self.value.shape)}.")
        if shaping not in (None, leave_one_out, centered_ranks, standardize):
            raise ValueError(
                f"{typed} knows no error of `shaping={getattr(shaping, '__name__', shaping)}`, which makes directions "
                "depend on each other: use `shaping=None` to see how good the gradient is."
            )
        groups = Groups(self.directions, self.sigma, self.alive)
        groups.check(typed)
        if self.control is not None:
            return self.control.error_bars()
        if shaping in (None, leave_one_out):
            return spread(groups, one_per_slice(self.coefficients, self.directions.space), self.flat)
        return compared(groups, self._reshaped, self.flat)

    def _reshaped(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the coefficients that a shaping makes of the values of some directions alone, zero at the others."""
        kept = kept if self.alive is None else kept & self.alive
        num = int(kept.sum())
        if num * len(self.settings.scheme.sides) < 2:
            raise ValueError(
                f"`estimate.standard_error()` shapes parts of the values on their own, and a part of {num} has nothing "
                "to be compared with: `num_samples` must be at least 4 here."
            )
        rows = torch.zeros(len(kept), 1, dtype=torch.float64)
        rows[kept, 0] = combine(self.settings, self.values[kept.to(self.values.device)], self.center).cpu()
        return rows

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
