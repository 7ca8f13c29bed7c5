"""Bias and variance over a range of sigma, and the best of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from zograd.diagnostics.function.samples import Samples
from zograd.diagnostics.function.subject import OutOfBudgetError
from zograd.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd.diagnostics.function.subject import Subject

_POINTS = 9
_SEED = 1  # one for all sigmas, so that the same directions are compared
_AGREEING = 0.3  # a relative difference of slopes
_FLAT = 1.5  # scores within this factor of the best are as good
_WEIGHT = 25 * 0.81 / 0.19  # directions of 25 steps, in units of the squared deviation
_HALF = 0.5  # a gradient off by more is another one, and its deviation no measure


@dataclass(frozen=True)
class Radius:
    """Bias and deviation at one sigma, measured with antithetic directions.

    Attributes:
        sigma: the largest radius of a leaf.
        signal: the length of the mean gradient there; 0 where it does not show above the noise.
        bias: the distance of that mean from the reference, over the reference's length; nan without a reference. It
            is autograd's gradient, or that of the least sigma whose differences are neither noise nor jumps.
        bias_limit: what that hardly exceeds, its two standard errors included.
        deviation: the deviation of one direction's estimate, likewise over the reference's length.
        error: what ``fn`` raised there, or None.
        is_reference: whether the others are compared with this one, where autograd gives no gradient.
    """

    sigma: float
    signal: float = math.nan
    bias: float = math.nan
    bias_limit: float = math.nan
    deviation: float = math.nan
    error: str | None = None
    is_reference: bool = False
    samples: Samples | None = field(default=None, repr=False, compare=False)

    @property
    def slopes(self) -> torch.Tensor:
        """The antithetic estimates of the slope along each direction, where there are any."""
        assert self.samples is not None
        return self.samples.slopes


def grid(subject: Subject, num: int) -> list[float]:
    """Return sigmas from far below the size of the parameters to it, the one that was given among them."""
    low = -6.0 if subject.space.dtype == torch.float64 else -4.0
    num, given = min(num, _POINTS), subject.sigma
    sigmas = [subject.size * 10 ** (low * (1 - k / (num - 1))) for k in range(num)]
    if given is not None:
        nearest = min(sigmas, key=lambda s: abs(math.log(s / given)))
        sigmas[sigmas.index(nearest)] = given
    return sorted(sigmas)


def measure(subject: Subject, sigma: float, num: int) -> Radius:
    """Estimate at one sigma; what ``fn`` raises there is part of the answer."""
    try:
        samples = Samples(subject.estimate(sigma, num, _SEED))
    except OutOfBudgetError:
        return Radius(sigma, error="not looked at: the budget was spent")
    except Exception as error:  # fn's own at some point, or a value that is not finite
        own = error.__cause__ if isinstance(error, EvaluationError) and error.__cause__ else error
        return Radius(sigma, error=f"{type(own).__name__}: {own}")
    found = samples.length
    return Radius(sigma, math.sqrt(found.square) if found.resolved else 0.0, samples=samples)


def typical_slope(radii: Sequence[Radius]) -> float:
    """Return the slope along a direction, the median over sigma, since the ends are noise and curvature."""
    sizes = sorted(_rms(r) for r in radii if r.samples is not None)
    return sizes[len(sizes) // 2] if sizes else 0.0


def with_bias(
    radii: Sequence[Radius], gradient: torch.Tensor | None, mean: torch.Tensor | None, limit: float
) -> list[Radius]:
    """Fill in bias and deviation, relative to autograd's gradient or to the least sigma that shows one.

    The differences of coefficients along the same directions leave the noise of the directions out.

    Args:
        radii: of one seed.
        gradient: autograd's, flat, or None.
        mean: that of an estimate of it.
        limit: the round-off limit, below which nothing is a reference.

    Returns:
        The same with more filled in.
    """
    if gradient is not None and mean is not None:
        length = float(mean.double().norm())
        return [r if r.samples is None else _compared(r, r.samples.slopes_of(gradient), length) for r in radii]
    reference = _reference([r for r in radii if r.samples is not None and r.sigma >= limit])
    if reference is None:
        return list(radii)
    length = reference.signal or _rms(reference)
    marked = [replace(r, is_reference=r is reference) for r in radii]
    return [r if r.samples is None else _compared(r, reference.slopes, length) for r in marked]


def _reference(usable: list[Radius]) -> Radius | None:
    """Return the least sigma whose slopes are those of the next one, too; else the least that shows a gradient."""
    agreeing = (a for a, b in itertools.pairwise(usable) if _agree(a, b))
    return next(agreeing, None) or next((r for r in usable if r.signal > 0), None)


def _compared(r: Radius, expected: torch.Tensor, length: float) -> Radius:
    assert r.samples is not None
    off = r.samples.length_of(r.slopes - expected)
    return replace(
        r,
        bias=math.sqrt(max(off.square, 0.0)) / length,
        bias_limit=math.sqrt(off.most()) / length,
        deviation=math.sqrt(r.samples.length.variance) / length,
    )


def smooth(at: Radius, radii: Sequence[Radius]) -> bool:
    """Return whether the slopes at a sigma are those at a neighboring one: the function is nearly linear over it."""
    usable = [r for r in radii if r.samples is not None]
    k = next(i for i, r in enumerate(usable) if r.sigma == at.sigma)
    return any(_agree(at, other) for other in (*usable[max(0, k - 1) : k], *usable[k + 1 : k + 2]))


def _agree(a: Radius, b: Radius) -> bool:
    return bool(a.slopes.any()) and float((a.slopes - b.slopes).norm()) < _AGREEING * float(a.slopes.norm())


def _rms(r: Radius) -> float:
    return float(r.slopes.square().mean().sqrt())


def choose(radii: Sequence[Radius], limit: float) -> Radius | None:
    """Return the sigma of least error over some steps at the N of a cosine of 0.9; of equally good ones the middle.

    Noise averages out over the steps of an optimizer and bias does not, so the score counts a 25th of the variance.

    Returns:
        It, or None where no sigma gave estimates.
    """
    usable = [r for r in radii if r.deviation > 0 and r.sigma >= limit]
    if not usable:
        shown = [r for r in radii if r.samples is not None and r.sigma >= limit]
        return max(shown, key=lambda r: r.sigma) if shown else None
    best = min([r.deviation for r in usable if r.bias < _HALF] or [r.deviation for r in usable])
    scores = [(r.bias**2 + (r.deviation / best) ** 2 / _WEIGHT, r) for r in usable]
    least = min(score for score, _ in scores)
    good = [r for score, r in scores if score <= _FLAT * least]
    return good[len(good) // 2]


def noise_limit(level: float, slope: float) -> float:
    """Return the sigma at which noise of that level is a tenth of a difference along a slope."""
    return 10 * level / (math.sqrt(2) * slope) if slope else 0.0


def roundoff_limit(subject: Subject, value: float, level: float, slope: float) -> float:
    """Return the sigma below which rounding is more than a tenth of the differences.

    Rounding of values: the last place of the value's dtype, or what the difference table showed. Rounding of points:
    the last place of the parameters, against a step of sigma.
    """
    eps = torch.finfo(subject.dtype or torch.float32).eps
    sizes = [float(p.double().square().mean().sqrt()) * torch.finfo(p.dtype).eps for p in subject.params if p.numel()]
    values = noise_limit(max(eps / math.sqrt(12) * abs(value), level), slope)
    return max(values, 10 * max(sizes) / math.sqrt(12))
