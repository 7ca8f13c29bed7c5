"""Shaping: pure functions from the values of an estimate to values of the same shape.

A shaping sees the float64 values of all directions at once, as ``(directions, sides)`` with the center left out (for a
scheme that uses the center, minus the center's value), and returns values of that shape. The scheme's weights are
applied to what it returns. The value that the decorated function returns is never shaped.

Which of them change what is estimated:

- :func:`leave_one_out` does not: the mean of the estimate stays the gradient of the smoothed function.
- :func:`centered_ranks` does: its mean points uphill on the *ranks* of the values. On a linear function that is the
  gradient's direction with a length that does not depend on the gradient's; increasing transformations of ``fn`` change
  nothing.
- :func:`standardize` divides by the deviation of the values, which differs from estimate to estimate: the direction
  stays that of the gradient, the length becomes about one over sigma for any scale of ``fn``.
- :func:`top_directions` does both: it divides like :func:`standardize` and leaves directions out by their values, which
  favors those along which ``fn`` gets far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from zograd._base import checks

__all__ = ["Shaping", "centered_ranks", "leave_one_out", "standardize", "top_directions"]


def __dir__() -> list[str]:
    return list(__all__)


Shaping: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""What ``shaping=`` accepts, a function from the values of all directions (those not dropped), of shape (directions,
sides), to numbers of that shape which take their place."""


def leave_one_out(values: torch.Tensor) -> torch.Tensor:
    r"""Subtract from each direction's values the mean value of all *other* directions.

    .. math:: \tilde F_{ij} = F_{ij} - \frac{1}{(N - 1) J} \sum_{k \ne i} \sum_j F_{kj}

    The baseline is independent of direction i, so the estimate keeps its mean; a baseline that included direction i
    would shrink the gradient by 1 - 1/N. It is for :data:`~zograd.schemes.NAIVE`, whose variance grows with the square
    of the objective's level. Where the weights sum to zero without the center, as in ``"antithetic"``, it cancels and
    changes nothing; from ``"forward"`` it takes the mean difference off. The directions of ``Hadamard()`` and
    ``Sobol()`` tell each other's signs: a baseline from the others would know part of the gradient, so it is refused
    there for all but such schemes.

    Args:
        values: of shape ``(directions, sides)``; two directions at least, since one has no others.

    Returns:
        Values of the same shape.

    Raises:
        ValueError: if there is one direction only.

    Examples:
        >>> leave_one_out(torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)).squeeze()
        tensor([-3.0000, -1.5000,  4.5000], dtype=torch.float64)

    References:
        Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (ICLR 2019 workshop).
    """
    num, sides = values.shape
    if num < 2:
        raise ValueError("`leave_one_out` needs the values of other directions: `num_samples` must be >= 2, got 1.")
    rows = values.sum(dim=1, keepdim=True)
    return values - (rows.sum() - rows) / ((num - 1) * sides)


def centered_ranks(values: torch.Tensor) -> torch.Tensor:
    r"""Replace values by their ranks, spread evenly over [-1/2, 1/2].

    .. math:: u = \frac{\operatorname{rank}(F)}{n - 1} - \frac{1}{2}

    Ranks run from 0 to n - 1 over all n values of all directions and sides; equal values share the mean of their ranks,
    so that values which are all equal give zero. An outlier counts as much as any largest value. This **changes what is
    estimated**: the gradient's length no longer depends on the size of ``fn``, so a learning rate found with ranks is
    one for ranks.

    Args:
        values: of shape ``(directions, sides)``.

    Returns:
        Values of the same shape.

    Raises:
        ValueError: if there is one value only, which has no rank among others.

    Examples:
        >>> centered_ranks(torch.tensor([[5.0, 1000.0], [5.0, -3.0]]))
        tensor([[ 0.0000,  0.5000],
                [ 0.0000, -0.5000]], dtype=torch.float64)

    References:
        Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning" (arXiv:1703.03864).
    """
    _check_several(values, "centered_ranks")
    flat = values.flatten()
    _, place, counts = torch.unique(flat, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks = last.double() - (counts + 1).double() / 2  # counted from 0, the middle of each run of equal values
    shaped: torch.Tensor = (ranks / (flat.numel() - 1) - 0.5)[place].view_as(values)
    return shaped


def standardize(values: torch.Tensor) -> torch.Tensor:
    r"""Subtract the mean of all values and divide by their standard deviation.

    .. math:: \tilde F = \frac{F - \operatorname{mean} F}{\operatorname{std} F}

    The deviation is that of the n values themselves (divided by n). Values that are all equal give zero. This **changes
    what is estimated**: the estimate has the gradient's direction up to the noise of the deviation, and a length that
    does not depend on the size of ``fn``.

    Args:
        values: of shape ``(directions, sides)``.

    Returns:
        Values of the same shape.

    Raises:
        ValueError: if there is one value only, which has no deviation.

    Examples:
        >>> standardize(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        tensor([[-1.4142,  1.4142],
                [ 0.0000,  0.0000]])

    References:
        Mania et al., "Simple random search provides a competitive approach to reinforcement learning"
        (arXiv:1803.07055).
    """
    _check_several(values, "standardize")
    return torch.zeros_like(values) if _equal(values) else (values - values.mean()) / _deviation(values)


def top_directions(k: int, *, largest: bool = False) -> Shaping:
    r"""Keep the k directions with the best values and divide by the deviation of what is kept.

    .. math:: \tilde F_{ij} = \frac{N}{k \, \operatorname{std}_{kept} F} F_{ij} \text{ for the kept i, else } 0

    A direction is as good as the best of its sides; the smallest value is the best, since ``loss.backward()`` is for
    descent. The factor N / k makes the mean over all N directions that over the k kept ones. Values that are all equal
    give zero. This **changes what is estimated**: the length no longer depends on the size of ``fn``, and directions
    along which ``fn`` gets nowhere do not count.

    Args:
        k: how many directions to keep, at most ``num_samples``; with all of them it is ARS without its selection.
        largest: that large values are the best, for an ``fn`` that is maximized.

    Returns:
        The shaping. It is for schemes whose weights sum to zero, such as ``"antithetic"``.

    Raises:
        ValueError: if k is below 1, and when called with fewer than k directions.
        TypeError: if k is not an int.

    Examples:
        >>> top_directions(1)(torch.tensor([[5.0, 4.0], [1.0, 3.0]]))
        tensor([[0., 0.],
                [2., 6.]])

    References:
        Mania et al., "Simple random search provides a competitive approach to reinforcement learning"
        (arXiv:1803.07055), algorithm 2, V1-t.
    """
    return _TopDirections(k, largest)


@dataclass(frozen=True)
class _TopDirections:
    k: int
    largest: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checks.integer(self.k, "`top_directions(k=...)`", least=1))

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        num = values.shape[0]
        if self.k > num:
            raise ValueError(f"`top_directions(k={self.k})` must not exceed `num_samples`, got {num} directions.")
        best = values.amax(dim=1) if self.largest else -values.amin(dim=1)
        # Stable, so that of equal directions the first is kept on every machine.
        kept = best.sort(descending=True, stable=True).indices[: self.k]
        chosen, shaped = values[kept], torch.zeros_like(values)
        if not _equal(chosen):
            shaped[kept] = chosen / _deviation(chosen) * (num / self.k)
        return shaped

    def __repr__(self) -> str:
        return f"top_directions({self.k}{', largest=True' * self.largest})"


def _equal(values: torch.Tensor) -> bool:
    """Whether the values have no spread; their computed deviation might be a rounding error."""
    return bool(values.amax() == values.amin())


def _deviation(values: torch.Tensor) -> torch.Tensor:
    """The standard deviation, in units of the largest: squares of large or small values leave the range."""
    centered = values - values.mean()
    unit = centered.abs().amax()
    return (centered / unit).square().mean().sqrt() * unit


def _check_several(values: torch.Tensor, name: str) -> None:
    if values.numel() < 2:
        raise ValueError(f"`{name}` compares values with each other: there must be at least 2, got 1.")


def check_shaping(shaping: Shaping, num: int | None, sides: int, typed: str, *, is_difference: bool) -> None:
    """Refuse what a shaping of ours could not do with so many values, before any is evaluated.

    Args:
        shaping: the shaping.
        num: how many directions there are, if that is known.
        sides: values of a direction.
        typed: the call, for errors.
        is_difference: whether the scheme's weights sum to zero.

    Raises:
        ValueError: if it could not.
    """
    if shaping is leave_one_out and num is not None and num < 2:
        raise ValueError(f"{typed} needs the values of other directions: `num_samples` must be at least 2.")
    if shaping in (centered_ranks, standardize) and num is not None and num * sides < 2:
        raise ValueError(f"{typed} compares values with each other: `num_samples` must be at least 2.")
    if isinstance(shaping, _TopDirections):
        if num is not None and num < shaping.k:
            raise ValueError(f"{typed} cannot keep more directions than there are: k must not exceed `num_samples`.")
        if not is_difference:
            raise ValueError(f"{typed} needs a scheme whose weights sum to zero, such as 'antithetic'.")
