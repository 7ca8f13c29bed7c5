"""Which sigma: bias against variance over a range of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from zograd.diagnostics.function.subject import OutOfBudgetError
from zograd.diagnostics.function.sweep import Samples, measure, sample
from zograd.errors import EvaluationError
from zograd.schemes import ANTITHETIC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd.diagnostics.function.subject import Subject
    from zograd.distributions.base import Distribution
    from zograd.estimate.statistics import Length

_POINTS = 9
_FLAT = 1.5  # scores within this factor of the best are as good


@dataclass(frozen=True)
class Radius:
    """What one sigma does, measured with antithetic directions.

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
    length: Length | None = field(default=None, repr=False, compare=False)


def grid(subject: Subject, given: float | None, num: int) -> list[float]:
    """Sigmas from far below the size of the parameters to it, and the one that was given."""
    size = math.sqrt(sum(float(p.double().square().sum()) for p in subject.params) / subject.space.size) or 1.0
    low = -6.0 if subject.space.dtype == torch.float64 else -4.0
    num = min(num, _POINTS)
    sigmas = [size * 10 ** (low * (1 - k / (num - 1))) for k in range(num)]
    if given is not None:
        nearest = min(sigmas, key=lambda s: abs(math.log(s / given)))
        sigmas[sigmas.index(nearest)] = given
    return sorted(sigmas)


def look(
    subject: Subject, distribution: Distribution, sigma: float, unit: tuple[float, ...], num: int, *, vmapped: bool
) -> Radius:
    """Sample at one sigma; what ``fn`` raises there is part of the answer."""
    radii = tuple(sigma * u for u in unit)
    try:
        samples = sample(subject, distribution, radii, num, seed=_SEED, vmapped=vmapped)
        found = measure(samples, samples.coefficients(ANTITHETIC))
    except OutOfBudgetError:
        return Radius(sigma, error="not looked at: the budget was spent")
    except Exception as error:  # fn's own at some point, or a value that is not finite
        own = error.__cause__ if isinstance(error, EvaluationError) and error.__cause__ else error
        return Radius(sigma, error=f"{type(own).__name__}: {own}")
    signal = math.sqrt(found.square) if found.resolved else 0.0
    return Radius(sigma, signal, samples=samples, length=found)


_SEED = 1  # one for all sigmas, so that the same directions are compared


def with_bias(
    radii: Sequence[Radius], gradient: torch.Tensor | None, mean: torch.Tensor | None, limit: float
) -> list[Radius]:
    """Fill in bias and deviation, relative to autograd's gradient or to the least sigma that shows one.

    The differences of coefficients along the same directions leave the noise of the directions out.

    Args:
        radii: of one seed.
        gradient: autograd's, flat, or None.
        mean: that of an estimate of it: the covariance of the directions times the gradient.
        limit: the round-off limit, below which nothing is a reference.

    Returns:
        The same with more filled in.
    """
    usable = [r for r in radii if r.samples is not None]
    reference = _reference([r for r in usable if r.sigma >= limit])
    if mean is not None:
        length = float(mean.double().norm())
    elif reference is not None:
        length = reference.signal or _rms(reference)
    else:
        return list(radii)
    return [r if r.samples is None else _filled(r, gradient, reference, length) for r in radii]


def _reference(usable: list[Radius]) -> Radius | None:
    """The least sigma whose slopes are those of the next one, too; else the least that shows a gradient."""
    pairs = itertools.pairwise(usable)
    agreeing = (a for a, b in pairs if _agree(a, b))
    return next(agreeing, None) or next((r for r in usable if r.signal > 0), None)


def smooth(best: Radius, radii: Sequence[Radius]) -> bool:
    """Whether the slopes at a sigma are also those at a neighboring one: the function is nearly linear over it."""
    usable = [r for r in radii if r.samples is not None]
    k = next(i for i, r in enumerate(usable) if r.sigma == best.sigma)
    return any(_agree(best, other) for other in (*usable[max(0, k - 1) : k], *usable[k + 1 : k + 2]))


def _agree(a: Radius, b: Radius) -> bool:
    assert a.samples is not None
    assert b.samples is not None
    x, y = (r.samples.coefficients(ANTITHETIC) for r in (a, b) if r.samples is not None)
    return bool(x.any()) and float((x - y).norm()) < _AGREEING * float(x.norm())


_AGREEING = 0.3  # as a relative difference


def _rms(r: Radius) -> float:
    assert r.samples is not None
    return float(r.samples.coefficients(ANTITHETIC).square().mean().sqrt())


def _filled(r: Radius, gradient: torch.Tensor | None, reference: Radius | None, length: float) -> Radius:
    assert r.samples is not None
    assert r.length is not None
    if gradient is not None:
        expected = r.samples.slopes(gradient)
    else:
        assert reference is not None
        assert reference.samples is not None
        expected = reference.samples.coefficients(ANTITHETIC)
    off = measure(r.samples, r.samples.coefficients(ANTITHETIC) - expected)
    return Radius(
        r.sigma,
        r.signal,
        math.sqrt(max(off.square, 0.0)) / length,
        math.sqrt(off.most()) / length,
        math.sqrt(r.length.variance) / length,
        is_reference=gradient is None and r is reference,
        samples=r.samples,
        length=r.length,
    )


def choose(radii: Sequence[Radius], limit: float) -> Radius | None:
    """The sigma of least error over some steps at the N of a cosine of 0.9; of equally good ones that in their middle.

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


_WEIGHT = 25 * 0.81 / 0.19  # directions of 25 steps, in units of the squared deviation
_HALF = 0.5  # a gradient off by more is another one, and its deviation no measure


def tenth(level: float, slope: float) -> float:
    """The sigma at which noise of that level is a tenth of a difference along a slope."""
    return 10 * level / (math.sqrt(2) * slope) if slope else 0.0


def roundoff_limit(subject: Subject, value: float, level: float, slope: float) -> float:
    """The sigma below which rounding is more than a tenth of the differences.

    Rounding of values: the last place of the value's dtype, or what the difference table showed. Rounding of points:
    the last place of the parameters, against a step of sigma.

    Returns:
        The limit.
    """
    eps = torch.finfo(subject.dtype or torch.float32).eps
    sizes = [float(p.double().square().mean().sqrt()) * torch.finfo(p.dtype).eps for p in subject.params if p.numel()]
    return max(tenth(max(eps / math.sqrt(12) * abs(value), level), slope), 10 * max(sizes) / math.sqrt(12))
